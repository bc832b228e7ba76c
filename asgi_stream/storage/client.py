"""The client of OpenSearch, and what its errors mean."""

from __future__ import annotations

import base64
from typing import Any

from asgi_stream.config import StorageConfig
from asgi_stream.errors import BackendError, ConfigurationError, require

CONNECTIONS = 4


def make_client(config: StorageConfig) -> Any:
    """Make opensearch-py's client. Opens nothing yet."""
    config.check()
    library = require("opensearchpy", extra="opensearch")
    options: dict[str, Any] = {}
    if config.auth_type == "basic":
        # Not by `http_auth`, which takes Latin-1: RFC 7617, section 2.1.
        words = f"{config.username}:{config.password}".encode()
        options["headers"] = {"authorization": f"Basic {base64.b64encode(words).decode()}"}
    elif config.auth_type == "aws":
        options["http_auth"] = _aws(config)
    if config.use_ssl:
        options |= {"use_ssl": True, "verify_certs": config.verify_certs, "ssl_show_warn": config.verify_certs}
        if config.ca_file:
            options["ca_certs"] = config.ca_file
    hosts = [{"host": host.strip(), "port": config.port} for host in config.host.split(",") if host.strip()]
    return library.OpenSearch(
        hosts=hosts,
        timeout=config.request_timeout,
        max_retries=0,  # what is sent again, and when, is decided here
        retry_on_timeout=False,
        pool_maxsize=CONNECTIONS,
        **options,
    )


def _aws(config: StorageConfig) -> Any:
    require("botocore", extra="aws")
    from botocore.session import Session  # type: ignore[import-untyped]
    from opensearchpy import Urllib3AWSV4SignerAuth

    credentials = Session().get_credentials()
    if credentials is None:
        raise ConfigurationError(
            "auth_type='aws' found no credentials: set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a profile, or a role"
        )
    return Urllib3AWSV4SignerAuth(credentials, config.aws_region, config.aws_service)


NOT_OPENSEARCH = (LookupError, TypeError, ValueError, AttributeError)
"""How an answer shows that something else gave it, such as a login page in between."""


def where(config: StorageConfig) -> str:
    """The server, for messages."""
    return f"{'https' if config.use_ssl else 'http'}://{config.host}:{config.port}"


def status_of(error: Exception) -> int:
    """The HTTP status of an error of the library; 0 if there was no answer."""
    status = getattr(error, "status_code", 0)
    return status if isinstance(status, int) else 0


def explain(config: StorageConfig, error: Exception) -> BackendError:
    """Say what is wrong, and what to do."""
    status = status_of(error)
    if status == 401:
        advice = "it refused the credentials: check username= and password= (OPENSEARCH_USERNAME, OPENSEARCH_PASSWORD)"
    elif status == 403:
        advice = f"it does not allow this (or its disk is full): {_short(error)}"
    elif "CERTIFICATE_VERIFY_FAILED" in str(error):
        advice = "its certificate is signed by nobody that is trusted here: set ca_file= (OPENSEARCH_CA_FILE)"
    elif isinstance(error, NOT_OPENSEARCH) or type(error).__name__ == "SerializationError":
        advice = f"what answers there is not OpenSearch: {type(error).__name__}: {_short(error)}"
    elif status == 0 and "SSL" in str(error):
        advice = f"TLS failed; is use_ssl= right for this port? {_short(error)}"
    elif status == 0:
        advice = f"it cannot be reached: {_short(error)}"
    else:
        advice = f"it answered {status}: {_short(error)}"
    made = BackendError(f"OpenSearch at {where(config)}: {advice}")
    made.__cause__ = error
    return made


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
