"""``python -m asgi_stream``."""

from asgi_stream.cli import main

main()
