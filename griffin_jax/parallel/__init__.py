"""Meshes of devices, and several processes that share one."""
