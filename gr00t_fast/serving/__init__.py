"""The server baseline: a policy behind a socket, in the protocol of NVIDIA's GR00T N1.5 inference service (ZeroMQ, or its HTTP twin)."""

from gr00t_fast.serving.client import PolicyClient
from gr00t_fast.serving.http import HttpPolicyServer
from gr00t_fast.serving.server import PolicyServer

__all__ = ["HttpPolicyServer", "PolicyClient", "PolicyServer"]
