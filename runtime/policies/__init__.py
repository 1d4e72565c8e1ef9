"""Pure scheduling policies: no asyncio, no torch, no clock of their own."""
