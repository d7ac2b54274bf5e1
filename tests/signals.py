"""Programs of the tests that are stopped by signals."""

AS_IN_A_TERMINAL = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(getattr(signal, "SIGHUP", signal.SIGTERM), signal.SIG_DFL)
"""
"""What such a program begins with: it would inherit that the tests themselves ignore signals, as `nohup` and background
jobs of a shell do."""
