"""Serving a policy: wire protocol, server, thin client, back ends and the compiler of engines.

A robot needs :mod:`policy_server.client` alone, which knows neither torch nor an inference library.
"""
