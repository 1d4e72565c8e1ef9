"""The parts of serve.py, which alone imports them; aiohttp, pydantic and prometheus-client are imported only here."""
