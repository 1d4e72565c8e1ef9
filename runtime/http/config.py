"""`HttpConfig`: every option of the HTTP server, declared once, and the rule for who may be served without keys."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields

from runtime.config import option
from vbert.errors import ConfigError

__all__ = ["HttpConfig", "is_loopback"]

_MIB = 2**20


def is_loopback(host: str) -> bool:
    """True only for an address, or `localhost`, that other machines cannot reach. Other names are not resolved."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """Limits that hold before the engine sees a request; those of inputs, tokens and queue are in EngineConfig."""

    host: str = option("127.0.0.1", "address to listen on; one that is not loopback needs keys")
    port: int = option(8080, "TCP port to listen on; 0: any free one")
    keys: str = option("", "file of hashed API keys; without it anyone who reaches the (loopback) address is served")
    max_body_bytes: int = option(8 * _MIB, "bytes of one JSON body; a tenant upload may have max_module_bytes")
    max_header_bytes: int = option(8190, "bytes of the request line, and of each header field")
    max_headers: int = option(64, "header fields of one request")
    max_uploads: int = option(2, "tenant uploads held in memory at once; more wait for their turn")
    read_timeout_s: float = option(15.0, "seconds within which a JSON body must have arrived")
    upload_timeout_s: float = option(300.0, "seconds within which a tenant upload must have arrived")
    write_timeout_s: float = option(60.0, "seconds a client may take none of an answer that waits for it")
    keepalive_s: float = option(75.0, "seconds a connection may wait for a whole request head, the first one included")

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port is {self.port}; give 0 to 65535")
        if not self.host:
            raise ConfigError("host is empty; give an address, 127.0.0.1 for this machine only")
        for option_field in fields(self):
            value = getattr(self, option_field.name)
            if option_field.name != "port" and isinstance(value, (int, float)) and value <= 0:
                raise ConfigError(f"{option_field.name} is {value}; it must be above 0")
        if not self.keys and not is_loopback(self.host):
            raise ConfigError(
                f"host {self.host} can be reached from other machines and no keys are set; "
                "give a keys file (option keys), or listen on 127.0.0.1"
            )
