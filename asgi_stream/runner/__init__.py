"""``asgi-stream run`` and ``asgi-stream tail``: any command's output, live, in a page and in other terminals."""
