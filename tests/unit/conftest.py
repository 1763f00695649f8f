"""Unit tests run without a cluster: starting one here is an error.  And the S3 of those that need
one.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
from pyarrow import fs

S3 = Callable[..., str]
"""(key, bucket of your own) -> URI of a local S3 server; the bucket exists where none is named."""
_BUCKET = "invar"
_S3_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}


def _forbidden(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "a unit test started Ray. Expected: tests/unit runs without a cluster. "
        "To do: move the test to tests/ray and use the fixture local_ray."
    )


# One patch a module, not one a test: hypothesis objects to function-scoped fixtures.
@pytest.fixture(scope="module", autouse=True)
def no_cluster() -> Iterator[None]:
    """Make ``ray.init`` raise, also where Ray would call it by itself."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray, "init", _forbidden)
        yield


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    """A local S3 server, reached over HTTP through pyarrow and obstore as a real one would be."""
    if not hasattr(fs, "S3FileSystem"):
        pytest.skip("this pyarrow has no S3FileSystem")
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    boto3 = pytest.importorskip("boto3")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)

    def uri(key: str, bucket: str = _BUCKET) -> str:
        address = f"endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        return f"s3://{bucket}/{key}?{address}"

    with pytest.MonkeyPatch.context() as patch:
        for name, value in _S3_ENVIRONMENT.items():
            patch.setenv(name, value)
        server.start()
        try:
            client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
            client.create_bucket(Bucket=_BUCKET)
            yield uri
        finally:
            server.stop()
