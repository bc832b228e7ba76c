"""How this package talks to Redis: where it is (`locate`), scripts, and one pipelined connection per event loop.

Connecting, authentication, TLS, Sentinel and Cluster are redis-py's. Only the reading and writing of an open connection
is our own, since what redis-py's does per command costs several times the command.
"""
