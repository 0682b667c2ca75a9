"""`serve` and `sandbox`: starting the product, and the fal simulator."""

from __future__ import annotations

import os
import sys

import click

from abhiapi.errors import BadRequest

DEFAULT_BIND, DEFAULT_SANDBOX_BIND = "127.0.0.1:8000", "127.0.0.1:8001"


@click.command()
@click.option("--sandbox", "with_sandbox", is_flag=True, help="Serve the built-in simulator of fal; no FAL_KEY needed.")
@click.option(
    "--demo",
    is_flag=True,
    help="With --sandbox: an account with 5,000 credits, a page that signs in to it, and a line to paste.",
)
@click.option("--bind", default=DEFAULT_BIND, show_default=True, metavar="HOST:PORT", help="Where to listen.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Number of processes.")
def serve(with_sandbox: bool, demo: bool, bind: str, workers: int) -> None:
    """Serve the proxy.

    Until SIGTERM or Ctrl-C; running calls are finished first. Runs gunicorn with gevent; `gunicorn app:app` in a
    checkout does the same. More than one worker needs PostgreSQL and Redis.

    \b
    Examples:
      FAL_KEY=... abhiapi serve --bind 0.0.0.0:8000
      abhiapi serve --sandbox            develop against the simulator, without spending
      abhiapi serve --sandbox --demo     the same, with an account and a key to start with
    """
    from abhiapi import serving
    from abhiapi.migrations import open_database

    if demo and not with_sandbox:
        raise click.UsageError("--demo goes with --sandbox")
    host, port = _parse_bind(bind)
    if not with_sandbox:
        serving.checked_settings()  # what is wrong with them is said before anything about the port
    serving.check_port_free(host, port)
    serving.make_importable()
    if with_sandbox:
        os.environ.update(serving.sandbox_database())
        os.environ.update(serving.start_simulator())
    settings = serving.checked_settings()
    serving.check_workers(settings, workers)
    others = serving.others_counting_apart(open_database(settings), settings)
    if others:
        click.echo(
            f"warning: {settings.shown_database_url} is served already (by {others}), each counting limits for itself: "
            "stop the others, or set ABHIAPI_LIMITS_URL to one Redis for all of them",
            err=True,
        )
    if demo:
        base_url = settings.public_url or f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
        key, link = serving.demo_key(settings), serving.demo_link(settings)
        is_offered = serving.may_offer_demo(settings, host)
        if is_offered:
            os.environ["ABHIAPI_DEMO_LINK"] = link
        os.environ["ABHIAPI_BANNER"] = serving.demo_banner(
            base_url, key, link, settings.shown_database_url, is_offered=is_offered
        )
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "gunicorn", *serving.gunicorn_arguments(bind, workers)])


@click.command()
@click.option("--bind", default=DEFAULT_SANDBOX_BIND, show_default=True, metavar="HOST:PORT", help="Where to listen.")
def sandbox(bind: str) -> None:
    """Run the fal simulator alone, until Ctrl-C.

    Point a proxy at it with ABHIAPI_FAL_RUN_URL, or call it as if it were fal.run with any key. Its front page says
    what it imitates and what it does not.

    \b
    Examples:
      abhiapi sandbox --bind 127.0.0.1:8001
      FAL_KEY=any ABHIAPI_FAL_RUN_URL=http://127.0.0.1:8001 abhiapi serve
    """
    from abhiapi import serving
    from abhiapi.pricing import shipped_rules
    from abhiapi.sandbox import create_sandbox
    from abhiapi.sandbox import server as sandbox_server

    host, port = _parse_bind(bind)
    serving.check_port_free(host, port)
    running = sandbox_server.serve(host, port, create_sandbox(shipped_rules()))
    click.echo(f"the simulator of fal is on http://{host}:{running.server_port}", err=True)
    try:
        running.serve_forever()
    except KeyboardInterrupt:
        running.stop(timeout=1)


def _parse_bind(text: str) -> tuple[str, int]:
    from abhiapi import serving

    try:
        return serving.parse_bind(text)
    except BadRequest as error:
        raise click.BadParameter(error.message, param_hint="--bind") from error
