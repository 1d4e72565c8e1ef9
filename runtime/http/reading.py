"""Reading a body from a client that may be slow, too large or wrong: kind, bytes and time are bounded."""

from __future__ import annotations

import asyncio

from aiohttp import hdrs, web

from runtime.errors import RequestTooLarge
from runtime.http.errors import BodyTimeout, MalformedBody, UnsupportedMedia

__all__ = ["JSON", "OCTETS", "check_media", "leave_expectation", "read_body"]

JSON, OCTETS = "application/json", "application/octet-stream"


def check_media(request: web.Request, media: str) -> None:
    """Raises UnsupportedMedia. A body without a content type is octets, as RFC 9110 has it."""
    found = request.content_type
    if found != media:
        raise UnsupportedMedia(f"the content type is {found[:80]}; this route takes {media}", param="Content-Type")
    if request.charset is not None and request.charset.lower() not in ("utf-8", "utf8"):
        raise UnsupportedMedia(f"the charset is {request.charset[:80]}; JSON is UTF-8", param="Content-Type")
    encoding = request.headers.get(hdrs.CONTENT_ENCODING, "identity")
    if encoding.lower() != "identity":
        raise UnsupportedMedia(
            f"the content encoding is {encoding[:80]}; send the bytes as they are", param="Content-Encoding"
        )


async def leave_expectation(request: web.Request) -> None:
    """Stands in for aiohttp's answer to `Expect: 100-continue`, which would invite a body before the key is checked."""


async def read_body(request: web.Request, *, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body. Raises RequestTooLarge, BodyTimeout, MalformedBody (broken framing).

    A declared length is believed at once; the bytes are counted all the same, since a chunked body declares none.
    """
    if request.content_length is not None and request.content_length > max_bytes:
        raise _too_large(request.content_length, max_bytes)
    if request.headers.get(hdrs.EXPECT, "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer proper has not begun
    pieces: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.content.iter_any():
                num_bytes += len(piece)
                if num_bytes > max_bytes:
                    raise _too_large(num_bytes, max_bytes)
                pieces.append(piece)
    except TimeoutError:
        raise BodyTimeout(f"{num_bytes} bytes of the body came within {timeout_s:g} s; send it faster") from None
    except web.RequestPayloadError as error:
        raise MalformedBody(f"the body ends or is framed wrongly: {error}") from error
    return b"".join(pieces)


def _too_large(num_bytes: int, max_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the body has {num_bytes} bytes or more, the limit is {max_bytes}; send less at once")
