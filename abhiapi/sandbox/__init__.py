"""A fal to develop against without spending: a WSGI simulator, its server, and its scripted weather.

`create_sandbox` makes one, `server.serve` puts it behind a socket; ``GET /_sandbox/`` says what it does not imitate.
"""

from abhiapi.sandbox.app import Sandbox, create_sandbox

__all__ = ["Sandbox", "create_sandbox"]
