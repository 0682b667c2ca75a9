"""How `gunicorn app:app` serves from a checkout: exactly as `abhiapi serve` does."""

from abhiapi.gunicorn_config import *  # noqa: F403
