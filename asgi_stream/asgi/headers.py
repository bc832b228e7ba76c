"""The headers of streams [W3]."""

UNBUFFERED = [
    (b"cache-control", b"no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
]
EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), *UNBUFFERED]
