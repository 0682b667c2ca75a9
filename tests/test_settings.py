"""Settings are read once; every bad value is reported, all of them together, and ends the process with status 2."""

from __future__ import annotations

import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from abhiapi.errors import SettingsError
from abhiapi.settings import Settings, default_database_url, variables
from tests.harness import ROOT, environment, free_port

BAD = {
    "FAL_KEY": "two words",
    "FAL_ADMIN_KEY": "two words",
    "ABHIAPI_DATABASE_URL": "mysql://localhost/db",
    "ABHIAPI_LIMITS_URL": "memcached://here",
    "ABHIAPI_PUBLIC_URL": "example.com",
    "ABHIAPI_MARGIN": "-0.1",
    "ABHIAPI_DEFAULT_HOLD": "1e2",
    "ABHIAPI_PRICES_SYNC_S": "59",
    "ABHIAPI_LEARN_HOLDS": "yes",
    "ABHIAPI_RATE_PER_MINUTE": "0",
    "ABHIAPI_CONCURRENCY": "many",
    "ABHIAPI_PRO_RATE_PER_MINUTE": "1e3",
    "ABHIAPI_PRO_CONCURRENCY": "-5",
    "ABHIAPI_UPSTREAM_TIMEOUT_S": "0.5",
    "ABHIAPI_FAL_CONCURRENCY": "few",
    "ABHIAPI_FAL_QUEUE_S": "0.5",
    "ABHIAPI_DRAIN_S": "31",
    "ABHIAPI_MAX_BODY_BYTES": "100MB",
    "ABHIAPI_FAL_RUN_URL": "ftp://fal.run",
    "ABHIAPI_FAL_QUEUE_URL": "https://user@queue.fal.run",
    "ABHIAPI_FAL_REST_URL": "https://rest.fal.ai?x=1",
    "ABHIAPI_FAL_API_URL": "https://api.fal.ai:99999/v1",
    "ABHIAPI_RECONCILE_INTERVAL_S": "never",
    "ABHIAPI_TRUSTED_PROXIES": "11",
    "ABHIAPI_METRICS_TOKEN": "naïve",
    "ABHIAPI_CORS_ORIGINS": "https://app.example.com/",
    "ABHIAPI_WEBHOOK_KEY": "too short",
    "ABHIAPI_WEBHOOK_ALLOW_LOOPBACK": "yes",
    "ABHIAPI_SECRET_KEY": "too-short",
    "ABHIAPI_OPEN_SIGNUP": "maybe",
    "ABHIAPI_FAL_USER_ID": "two words",
    "ABHIAPI_ALERT_WEBHOOK_URL": "hooks.example.com/secret",
    "ABHIAPI_LOG_FORMAT": "xml",
    "ABHIAPI_LOG_LEVEL": "loud",
    "ABHIAPI_LOG_CALLS": "some",
    "ABHIAPI_OTLP_ENDPOINT": "127.0.0.1:4318",
}


def test_the_defaults_are_those_of_the_contract() -> None:
    settings = Settings.from_env({})
    assert settings.fal_key is None
    assert settings.database_url == default_database_url()
    assert settings.margin == Decimal("0.05")
    assert (settings.rate_per_minute, settings.concurrency) == (30, 5)
    assert (settings.pro_rate_per_minute, settings.pro_concurrency) == (300, 40)
    assert (settings.upstream_timeout_s, settings.max_body_bytes) == (900, 104_857_600)
    assert settings.fal_run_url == "https://fal.run"
    assert settings.fal_queue_url == "https://queue.fal.run"
    assert settings.fal_rest_url == "https://rest.fal.ai"
    assert settings.fal_api_url == "https://api.fal.ai/v1"
    assert (settings.limits_url, settings.reconcile_interval_s, settings.trusted_proxies) == ("memory://", 5, 0)


def test_every_bad_value_is_reported_together() -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.from_env(BAD)
    named = {problem.split()[0] for problem in refusal.value.problems}
    assert named == set(BAD)


def test_every_variable_can_be_bad() -> None:
    """A new setting cannot be forgotten in the list above."""
    assert {variable.name for variable in variables()} == set(BAD)


def test_a_secret_may_lie_in_a_file(tmp_path: Path) -> None:
    """Trouble with the file is told like a bad value, and two answers to one question are none."""
    file = tmp_path / "key"
    file.write_text("id:from-a-file\n")
    named = {"FAL_KEY_FILE": str(file)}
    assert Settings.from_env(named).fal_key == "id:from-a-file"
    file.write_text("\n")
    assert Settings.from_env(named).fal_key is None
    for wrong in (named | {"FAL_KEY": "id:from-here"}, {"FAL_KEY_FILE": str(tmp_path / "nothing")}):
        with pytest.raises(SettingsError, match=r"^FAL_KEY .*FAL_KEY_FILE") as refusal:
            Settings.from_env(wrong)
        assert "from-here" not in str(refusal.value)
    file.write_text("two words")
    with pytest.raises(SettingsError, match="FAL_KEY must be printable"):
        Settings.from_env(named)


def test_secrets_are_neither_shown_nor_said() -> None:
    settings = Settings.from_env({"FAL_KEY": "id:top-secret", "ABHIAPI_METRICS_TOKEN": "hush-hush"})
    assert "top-secret" not in repr(settings)
    assert "hush-hush" not in repr(settings)
    for name in ("FAL_KEY", "ABHIAPI_WEBHOOK_KEY"):
        with pytest.raises(SettingsError) as refusal:
            Settings.from_env({name: "top secret"})
        assert "top secret" not in str(refusal.value)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "abhiapi.db", "mysql://localhost/ledger", "postgresql://host"]
)
def test_a_database_that_cannot_keep_a_ledger_is_a_bad_setting(url: str) -> None:
    with pytest.raises(SettingsError, match="ABHIAPI_DATABASE_URL"):
        Settings.from_env({"ABHIAPI_DATABASE_URL": url})


@pytest.mark.parametrize("name", ["ABHIAPI_DATABASE_URL", "ABHIAPI_LIMITS_URL", "ABHIAPI_FAL_RUN_URL"])
def test_a_password_in_a_bad_url_is_not_said(name: str) -> None:
    with pytest.raises(SettingsError, match=name) as refusal:
        Settings.from_env({name: "mysql://ann:top-secret@db.example:5432/ledger?password=top-secret"})
    assert "top-secret" not in str(refusal.value)
    assert "db.example" in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        *("redis://127.0.0.1", "redis://127.0.0.1:6379/3", "redis://:pw@cache.example:6379", "rediss://ann:pw@[::1]/0"),
        *("unix:///run/redis/redis.sock?db=2", "rediss://cache.example/0?ssl_ca_certs=/etc/ca.pem", "memory://"),
    ],
)
def test_where_limits_are_counted_may_be_said_in_these_ways(url: str) -> None:
    settings = Settings.from_env({"ABHIAPI_LIMITS_URL": url})
    assert settings.limits_url == url
    assert "pw" not in repr(settings)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "redis://",
            "redis://here:port/0",
            "redis://here:99999/0",
            "redis://here/name",
            "redis://here/0/1",
            "unix://",
        ),
        *("redis://here/0?socket_timeout=60", "redis+cluster://here", "memory://x", "redis here", "redis://he re/0"),
    ],
)
def test_an_address_that_is_no_redis_or_undoes_our_time_limits_is_a_bad_setting(url: str) -> None:
    with pytest.raises(SettingsError, match="ABHIAPI_LIMITS_URL"):
        Settings.from_env({"ABHIAPI_LIMITS_URL": url})


@pytest.mark.parametrize(
    "url", ["redis://:top/secret@here/x", "redis://:a@top-secret@here/x", "redis://here/x?password=top-secret"]
)
def test_no_password_is_said_however_wrong_the_url_around_it(url: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.from_env({"ABHIAPI_LIMITS_URL": url})
    assert "secret" not in str(refusal.value)


@pytest.mark.parametrize("digits", ["\u0663\u0663", "\uff13", "\u00b2"])
def test_numbers_are_written_in_plain_digits(digits: str) -> None:
    with pytest.raises(SettingsError) as refusal:
        Settings.from_env({"ABHIAPI_CONCURRENCY": digits, "ABHIAPI_MARGIN": digits})
    assert len(refusal.value.problems) == 2


def test_a_dotenv_file_that_is_no_text_is_a_bad_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_bytes(b"FAL_KEY=\xff\xfe\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        Settings.from_env()


@pytest.mark.parametrize(
    "text",
    ["*, https://a.example", "app.example.com", "https://A.example", "https://a.example/", "https://a.example:443",
     "http://a.example:80", "https://a.example:0", "https://a.example:70000", "https://u@a.example", "null",
     "https://*.example", "https://a.example https://b.example", "ftp://a.example", "https://\u00e4.example"],
)  # fmt: skip
def test_an_origin_that_no_browser_would_send_is_a_bad_setting(text: str) -> None:
    with pytest.raises(SettingsError, match="ABHIAPI_CORS_ORIGINS"):
        Settings.from_env({"ABHIAPI_CORS_ORIGINS": text})


def test_origins_are_a_list_or_all() -> None:
    assert Settings.from_env({}).cors_origins == frozenset()
    assert Settings.from_env({"ABHIAPI_CORS_ORIGINS": "*"}).cors_origins == {"*"}
    listed = Settings.from_env({"ABHIAPI_CORS_ORIGINS": " https://a.example, http://127.0.0.1:5173,http://[::1]:3000 "})
    assert listed.cors_origins == {"https://a.example", "http://127.0.0.1:5173", "http://[::1]:3000"}


def test_an_empty_value_is_the_default() -> None:
    assert Settings.from_env({"ABHIAPI_MARGIN": "", "FAL_KEY": "  "}) == Settings.from_env({})


def test_a_trailing_slash_of_a_url_does_not_matter() -> None:
    assert Settings.from_env({"ABHIAPI_FAL_RUN_URL": "http://127.0.0.1:1/"}).fal_run_url == "http://127.0.0.1:1"


def test_a_dotenv_file_fills_in_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("ABHIAPI_MARGIN=0.2\nABHIAPI_CONCURRENCY=7\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ABHIAPI_MARGIN", "0.3")
    settings = Settings.from_env()
    assert (settings.margin, settings.concurrency) == (Decimal("0.3"), 7)


def test_the_default_database_is_the_same_from_every_folder(tmp_path: Path) -> None:
    said = {
        subprocess.run(
            [sys.executable, "-c", "from abhiapi.settings import default_database_url as d; print(d())"],
            cwd=folder,
            env=environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        for folder in (tmp_path, ROOT, Path("/"))
    }
    assert len(said) == 1
    assert said.pop().startswith("sqlite:////")


@pytest.mark.parametrize("command", [["cli.py", "serve"], ["-m", "gunicorn", "app:app"]], ids=["serve", "gunicorn"])
def test_a_server_with_bad_settings_ends_with_status_2_and_says_all(tmp_path: Path, command: list[str]) -> None:
    env = environment(
        FAL_KEY="id:secret",
        ABHIAPI_DATABASE_URL=f"sqlite:///{tmp_path / 'a.db'}",
        ABHIAPI_MARGIN="lots",
        ABHIAPI_CONCURRENCY="0",
    )
    ended = subprocess.run(
        [sys.executable, *command, "--bind", f"127.0.0.1:{free_port()}"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "ABHIAPI_MARGIN" in ended.stderr
    assert "ABHIAPI_CONCURRENCY" in ended.stderr
    assert "Traceback" not in ended.stderr
