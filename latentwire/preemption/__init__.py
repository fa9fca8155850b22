"""Notices of preemption: recorded by a handler, acted on at boundaries."""
