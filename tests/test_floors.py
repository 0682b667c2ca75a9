"""The house rules about the code itself: imports point down, and each neighbour has one door (docs/architecture.md)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.harness import ROOT

PACKAGE = ROOT / "abhiapi"

# From the ground up; a module may import those of its own floor and below. A package stands for all in it.
FLOORS: tuple[tuple[str, ...], ...] = tuple(
    tuple(floor.split())
    for floor in (
        """
        errors money ids days allowances csvtext spent estimates price_terms price_file price_sync pricing metering
        jsonbytes encodings eventstream fairness
        wire queuewire webhookwire target addresses redaction redis_url setting_forms
        """,
        """
        settings tables committer
        db db_base db_sqlite db_postgres db_postgres_tx liveness migrations migrations_postgres
        http_parser http_adapter fal fal_keys platform_api operator_webhook
        signing outbound passwords
        metrics polls windows redis_line shared_scripts shared_counts shared_turns logs tracing
        """,
        """
        ledger spending calls jobs billing idempotency keys accounts processes
        prices fal_prices costs timers
        reports lookups statements statement_forms audit alerts shapes webhooks users
        playground holds price_problems vitals following
        """,
        """
        limits gate runtime admission replay
        gateway queue_gateway queue_bodies upload_gateway
        settlement reconcile sweep sync fal_bill alerting turns
        webhook_intake webhook_delivery
        telemetry monitoring
        """,
        "web commands serving draining wsgi gunicorn_config worker sandbox",
    )
)
FACTS, NEIGHBOURS, ROWS, PRODUCT, SHELLS = FLOORS

# What only the named modules may import: others go through them.
DOORS = {
    "requests": {"fal", "http_adapter", "operator_webhook"},
    "geventhttpclient": {"http_parser"},
    "socket": {"http_adapter", "outbound", "serving", "worker", "sandbox"},
    "cryptography": {"signing"},
    "sqlite3": {"db_sqlite", "migrations", "commands"},
    "psycopg": {"db_postgres", "db_postgres_tx", "migrations_postgres"},
    "sqlalchemy": {
        "db",
        "db_base",
        "db_sqlite",
        "db_postgres",
        "db_postgres_tx",
        "tables",
        "settings",
        "setting_forms",
        "commands.transfer",
        *ROWS,
    },
    "flask": {"web", "settings"},
    "flask_limiter": {"web"},
    "flask_login": {"web"},
    "flask_wtf": {"web"},
    "argon2": {"passwords"},
    "gunicorn": {"worker"},
    "click": {"commands"},
    "prometheus_client": {"metrics"},
    "redis": {"redis_line"},
    "opentelemetry": {"tracing"},
    "urllib3": set(),
    "httpx": set(),
    "urllib.request": set(),
    "pickle": set(),
}
ENVIRONMENT_READERS = {"settings", "serving", "gunicorn_config", "commands.serve", "commands.checks"}
PRINTERS = {"commands", "serving", "gunicorn_config", "sandbox.__main__"}
IN_SECONDS = {
    "limits",
    "committer",
    "db_postgres",
    "db_postgres_tx",
    "http_adapter",
    "migrations",
    "runtime",
    "worker",
    "metrics",
    "polls",
    "fairness",
    "gate",
    "redis_line",
    "shared_counts",
    "shared_turns",
    "windows",
    "sandbox",
    "wsgi",
    "serving",
    "gunicorn_config",
    "logs",
    "telemetry",
    "tracing",
    "monitoring",
}


def paths() -> dict[str, Path]:
    """Where every module of the package is, by its name in it; packages by theirs."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def modules() -> dict[str, ast.Module]:
    return {name: ast.parse(path.read_text(), str(path)) for name, path in paths().items()}


def all_but(*excluded: str) -> list[str]:
    return [name for name in modules() if name.split(".")[0] not in excluded]


def floor_of(module: str) -> int:
    (floor,) = [number for number, names in enumerate(FLOORS) if module.split(".")[0] in names]
    return floor


def is_in(module: str, names: set[str]) -> bool:
    return module in names or module.split(".")[0] in names


@cache
def nodes(module: str) -> tuple[ast.AST, ...]:
    """All nodes of a module but what is there for the type checker only."""
    return tuple(_nodes(module))


def _nodes(module: str) -> Iterator[ast.AST]:
    waiting: list[ast.AST] = [modules()[module]]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        waiting.extend(ast.iter_child_nodes(node))


@cache
def imported(module: str) -> tuple[str, ...]:
    """Absolute names of what a module imports, functions' own imports included."""
    return tuple(_imported(module))


def _imported(module: str) -> Iterator[str]:
    for node in nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole.removeprefix("abhiapi.") in modules() else str(node.module)


def imported_modules(module: str) -> set[str]:
    ours = {name.removeprefix("abhiapi.") for name in imported(module) if name.startswith("abhiapi.")}
    return ours - {module}


@cache
def calls_of(module: str) -> tuple[tuple[str, ast.Call], ...]:
    return tuple((ast.unparse(node.func), node) for node in nodes(module) if isinstance(node, ast.Call))


def test_every_module_has_its_floor_and_every_floor_its_modules() -> None:
    top = {name.split(".")[0] for name in modules() if name}
    assert top == {name for floor in FLOORS for name in floor}


@pytest.mark.parametrize("module", [name for name in paths() if name])
def test_imports_point_down(module: str) -> None:
    for other in imported_modules(module):
        assert floor_of(other) <= floor_of(module), f"{module} imports {other}, which is above it"


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {module: imported_modules(module) for module in modules() if module}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("library", DOORS)
def test_each_neighbour_has_one_door(library: str) -> None:
    users = {
        module for module in modules() for name in imported(module) if name == library or name.startswith(f"{library}.")
    }
    assert {module for module in users if not is_in(module, DOORS[library])} == set()


def test_facts_and_arithmetic_do_nothing_but_compute() -> None:
    """No clock, no chance but what is handed in, no files, no framework."""
    banned = {"time", "os", "random", "gevent", "asyncio", "threading", "subprocess", "logging", "tempfile"}
    for module in FACTS:
        assert {name.split(".")[0] for name in imported(module)} & banned == set(), module
        assert not [name for name, _ in calls_of(module) if name in ("open", "datetime.now", "date.today")], module


def test_the_gateway_knows_no_web_framework() -> None:
    aside = ("limits", "runtime", "sweep")
    for module in (*FACTS, *ROWS, *(name for name in PRODUCT if name not in aside)):
        frameworks = {"flask", "werkzeug", "gunicorn", "click", "requests"}
        assert {name.split(".")[0] for name in imported(module)} & frameworks == set(), module


def test_only_the_settings_read_the_environment() -> None:
    for module in modules():
        reads = [
            node
            for node in nodes(module)
            if isinstance(node, ast.Attribute)
            and node.attr.startswith(("environ", "getenv"))
            and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb")
        ]
        assert not reads or module in ENVIRONMENT_READERS, module


def test_no_float_touches_money() -> None:
    """Decimals are made from strings, and there is one rounding function."""
    for module in all_but(*IN_SECONDS):
        for node in nodes(module):
            assert not (isinstance(node, ast.Constant) and isinstance(node.value, float | complex)), (
                module,
                node.lineno,
            )
        names = [name for name, _ in calls_of(module) if name in ("float", "round", "math.ceil", "math.floor")]
        assert names == [], module


def test_quotients_of_integers_are_not_taken_with_a_slash() -> None:
    """``/`` of two integers is a float; in the money modules it stands between Decimals only (estimates)."""
    for module in (
        "money",
        "metering",
        "ledger",
        "calls",
        "accounts",
        "prices",
        "shapes",
        "reports",
        "audit",
        "admission",
        "gateway",
        "jobs",
        "webhooks",
        "webhook_intake",
        "settlement",
        "queue_gateway",
    ):
        divisions = [node for node in nodes(module) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div)]
        assert divisions == [], module


def test_nothing_is_printed_but_by_shells() -> None:
    for module in modules():
        if any(name == "print" for name, _ in calls_of(module)):
            assert is_in(module, PRINTERS), module


def test_every_module_says_what_it_owns() -> None:
    for module, tree in modules().items():
        docstring = ast.get_docstring(tree) or ""
        assert len(docstring.split()) >= 3, module or "abhiapi"


def test_no_failure_is_swallowed() -> None:
    for module in modules():
        for node in nodes(module):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{module}:{node.lineno}: a bare except"
                broad = {"Exception", "BaseException"} & {
                    part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)
                }
                silent = all(isinstance(statement, ast.Pass | ast.Continue) for statement in node.body)
                assert not (broad and silent), f"{module}:{node.lineno}: a failure of any kind is swallowed"


def test_no_sql_is_built_from_strings() -> None:
    """Values are bound; the one thing that cannot be is the constant after PRAGMA."""
    for module in modules():
        for name, call in calls_of(module):
            if name.rpartition(".")[2] not in ("execute", "executemany", "executescript", "text") or not call.args:
                continue
            statement = call.args[0]
            if isinstance(statement, ast.JoinedStr) and ast.unparse(statement).startswith(("f'PRAGMA ", 'f"PRAGMA ')):
                continue
            built = [part for part in ast.walk(statement) if isinstance(part, ast.JoinedStr | ast.BinOp | ast.Call)]
            reads_file = name.endswith("executescript") and "read_text" in ast.unparse(statement)
            assert not built or reads_file, f"{module}:{call.lineno}: {ast.unparse(statement)}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_no_test_stops_the_world_by_sleeping(path: Path) -> None:
    source = path.read_text()
    for node in ast.walk(ast.parse(source)) if "sleep(" in source else ():
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("time.sleep", "sleep"), node.lineno
