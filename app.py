"""The WSGI entry of a checkout: `gunicorn app:app` serves it (gunicorn.conf.py beside it says how)."""

from abhiapi.wsgi import app

__all__ = ["app"]
