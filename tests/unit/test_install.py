"""The installer's decisions; installing itself is what every fresh clone does."""

from pathlib import Path

import pytest

from cluster.install import (
    InstallError,
    check_python,
    direct_dependencies,
    explain_failure,
    index_answers,
    pip_settings,
    select_constraints,
    uv_arguments,
    uv_environment,
)


def test_another_python_is_sent_to_the_right_one() -> None:
    with pytest.raises(InstallError, match=r"this is Python 3\.12, .* Run: python3\.11 cluster"):
        check_python((3, 12, 1), has_ensurepip=True)


def test_a_python_without_venv_is_told_what_to_install() -> None:
    with pytest.raises(InstallError, match=r"apt-get install python3\.11-venv"):
        check_python((3, 11, 7), has_ensurepip=False)


def test_the_right_python_passes() -> None:
    check_python((3, 11, 0), has_ensurepip=True)


def test_an_index_that_does_not_answer_is_left_out() -> None:
    assert not index_answers("http://127.0.0.1:9/whl")


def test_every_direct_dependency_is_pinned() -> None:
    pins = Path("cluster/constraints.txt").read_text().splitlines()
    direct = direct_dependencies(Path("pyproject.toml").read_text())
    pinned = {
        pin.split("==")[0].lower().replace("_", "-") for pin in select_constraints(pins, None)
    }
    assert direct <= pinned


def test_uv_looks_where_pip_is_told_to_look(tmp_path: Path) -> None:
    listing = (
        f":env:.find-links='{tmp_path} /not/there https://wheels/'\n"
        ":env:.index-url=''\n"
        "global.extra-index-url='file:///one/simple\\nhttps://two/simple'\n"
        "global.find-links='/elsewhere'\n"
        "global.index-url='https://mirror/simple'\n"
        "global.no-index='false'\n"
        "install.index-url='https://nearer/simple'\n"
        "list.format='columns'\n"
    )
    assert uv_arguments(pip_settings(listing)) == [
        *("--default-index", "https://nearer/simple"),
        *("--index", "file:///one/simple", "--index", "https://two/simple"),
        *("--find-links", str(tmp_path), "--find-links", "https://wheels/"),
    ]
    assert uv_arguments(pip_settings("global.no-index='y'")) == ["--no-index"]
    assert uv_arguments(pip_settings("")) == []


def test_uv_gets_pips_certificate_proxy_and_patience() -> None:
    settings = pip_settings("global.cert='/pip.crt'\n:env:.default-timeout='180'\n")
    given = {"SSL_CERT_FILE": "/system.crt", "REQUESTS_CA_BUNDLE": "/requests.crt", "HOME": "/root"}
    told = uv_environment(settings, given)
    assert told == {**given, "SSL_CERT_FILE": "/pip.crt", "UV_HTTP_TIMEOUT": "180"}
    assert uv_environment({}, given)["SSL_CERT_FILE"] == "/requests.crt"
    proxy = uv_environment({"proxy": "http://proxy:1"}, {})
    assert proxy == {"HTTP_PROXY": "http://proxy:1", "HTTPS_PROXY": "http://proxy:1"}


@pytest.mark.parametrize(
    "words",
    [
        "Because there is no version of torch==2.13.0 and",
        "Because torch was not found in the package registry and",
    ],
)
def test_a_torch_that_is_not_found_is_told_with_its_remedy(words: str) -> None:
    assert "PIP_FIND_LINKS" in explain_failure(words, may_lack_torch=True)
    assert "PIP_FIND_LINKS" not in explain_failure(words, may_lack_torch=False)
    assert words in explain_failure(words, may_lack_torch=False)
