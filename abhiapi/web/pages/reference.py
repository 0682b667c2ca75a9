"""The API reference: `/` and `/docs` (one page), the texts of docs/ at `/docs/{page}`, and `/openapi.json`.

Nothing on these pages is a figure of its own: prices are the catalogue's, limits the plans', the host is this one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from flask import Blueprint, Response, jsonify, make_response, render_template, request
from markupsafe import Markup
from werkzeug.exceptions import NotFound

from abhiapi import __version__
from abhiapi.web import proxy
from abhiapi.web.caller import runtime
from abhiapi.web.pages import demo, headers, openapi, price_table, texts

IMAGE, VIDEO = "fal-ai/flux/dev", "fal-ai/kling-video/v2/master/text-to-video"
QUICK_START = (
    ("Image Generation", IMAGE, '{"prompt": "a futuristic city at night", "image_size": "landscape_4_3"}'),
    ("Video Generation", VIDEO, '{"prompt": "drone shot over mountains", "duration": "5"}'),
    ("Upscaling", "fal-ai/creative-upscaler", '{"image_url": "https://example.com/photo.jpg", "scale": 4}'),
)
BILLING_EXAMPLE = """\
{
  // ... normal fal.ai response fields ...
  "images": [{ "url": "https://storage.googleapis.com/..." }],

  "_billing": {
    "model": "fal-ai/flux/dev",
    "credits_used": 12,
    "cost_usd": 0.012,
    "balance_remaining": 4988
  }
}"""


@dataclass(frozen=True, slots=True)
class Guide:
    """A page of docs/ in the menu: under which name, and what it is good for."""

    page: str
    anchor: str
    name: str
    what: str

    @property
    def url(self) -> str:
        return f"/docs/{self.page}" + (f"#{self.anchor}" if self.anchor else "")


GUIDES = (
    Guide("clients", "curl", "curl", "Jobs in fal's queue from a shell."),
    Guide("clients", "python", "Python", "fal_client with two variables set."),
    Guide("clients", "javascript", "JavaScript", "@fal-ai/client in Node, one function to add."),
    Guide("browser", "", "In a browser", "@fal-ai/client by its proxyUrl, with or without a server of your own."),
    Guide("any-client", "", "Any other client", "Anything that speaks HTTP, or is made from an OpenAPI description."),
    Guide("webhooks", "", "Webhooks", "Results delivered to you, signed."),
    Guide("uploads", "", "Uploads", "Files as input."),
    Guide("api", "", "All the details", "Every route, header, error and rule of billing."),
)


def blueprint() -> Blueprint:
    routes = Blueprint("reference", __name__, template_folder="../templates")
    routes.get("/")(index)
    routes.get("/docs", strict_slashes=False)(index)
    routes.get("/docs/<page>")(guide)
    routes.get("/openapi.json")(description)
    routes.after_request(_finished)
    return routes


def index() -> str:
    """The page itself; only its price list with ``?part=prices``, for the script that searches as one types."""
    rt = runtime()
    catalogue = rt.catalogue()
    found = price_table.page(catalogue, request.args.get("q", ""), _page_number())
    if request.args.get("part") == "prices":
        return render_template("reference/prices.html", prices=found)
    return render_template(
        "reference/index.html",
        **_frame(),
        prices=found,
        kinds=price_table.kinds(catalogue),
        models=len(catalogue),
        plans=rt.limits.plans,
        quick_start=[(name, _curl(model, body)) for name, model, body in QUICK_START],
        billing_example=BILLING_EXAMPLE,
        code=code,
    )


def guide(page: str) -> str:
    """One of the texts of docs/. Raises werkzeug's `NotFound`."""
    if page not in texts.names():
        raise NotFound  # handled as any path without a route is: see `missing`
    return render_template("reference/guide.html", **_frame(), text=texts.text(page))


def missing() -> Response | None:
    """What whoever took a wrong turn under /docs reads, if it is a person: programs get the error's JSON."""
    if not request.path.startswith("/docs/"):
        return None
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) != "text/html":
        return None
    return _finished(make_response(render_template("reference/missing.html", **_frame()), 404))


def description() -> Response:
    """Our routes in OpenAPI, for clients and tools."""
    return jsonify(openapi.description(_base_url()))


def _finished(response: Response) -> Response:
    if demo.link() is not None:
        response.headers["Cache-Control"] = "no-store"
    return headers.public(response)


def _frame() -> dict[str, object]:
    """What every page of the reference shows around its text."""
    base_url = _base_url()
    host = urlsplit(base_url).netloc
    return {"base_url": base_url, "host": host, "guides": GUIDES, "version": __version__, "demo_link": demo.link()}


def _base_url() -> str:
    settings = runtime().settings
    return settings.public_url or proxy.base_url(request.environ, settings.trusted_proxies)


def code(language: str, content: str) -> Markup:
    """A block of code as the guides have it."""
    return Markup(texts.code_html(language, content))


def _page_number() -> int:
    text = request.args.get("page", "1")
    return int(text) if re.fullmatch(r"[0-9]{1,6}", text) else 1


def _curl(model: str, body: str) -> str:
    return (
        f"curl -X POST {_base_url()}/{model} \\\n"
        '  -H "x-api-key: sk-fal-your-key" \\\n'
        '  -H "Content-Type: application/json" \\\n'
        f"  -d '{body}'"
    )
