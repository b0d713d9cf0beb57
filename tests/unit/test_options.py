"""What is wrong with an option is said when the application is built: the mount, the option, the cure."""

import dataclasses
import re
from pathlib import Path

import pytest

from tornado_proxy import OptionError, ProxyOptions, mount
from tornado_proxy.clients.curl import CurlOptions

URL = "http://127.0.0.1:9000"


NONSENSE = {"object": object(), "nan": float("nan"), "bytes": b"x", "empty": ""}


def useless_values():
    """Yield each option with each value that no option can use."""
    for name in [field.name for field in dataclasses.fields(ProxyOptions) if field.init]:
        for kind, value in NONSENSE.items():
            yield pytest.param(name, value, id=f"{name}-{kind}")


class TestStartUpErrors:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"upstream": "localhost:9000"}, ["has no scheme", "http://localhost:9000"]),
            ({"upstream": 5}, ["upstream 5", "http://"]),
            ({"upstrem": URL}, ["'upstrem' is not an option", "upstream"]),
            ({"client": "netscape"}, ["client 'netscape'", "'curl'"]),
            ({"client_options": {"verify": True}}, ["client_options", "'verify'", "validate_cert"]),
            ({"client_options": {"max_clients": "5"}}, ["max_clients '5'", "100"]),
            ({"client_options": {"validate_cert": "no"}}, ["validate_cert 'no'", "True or False"]),
            ({"client_options": {"ca_certs": "/nowhere.pem"}}, ["ca_certs '/nowhere.pem'", "PEM"]),
            ({"client_options": {"http_version": "4"}}, ["http_version '4'", "1.1"]),
            ({"response_mode": "chunked"}, ["response_mode 'chunked'", "'stream', 'buffer'"]),
            ({"forwarded": "x"}, ["forwarded 'x'", "'rfc7239'"]),
            ({"retries": -1}, ["retries -1", "0 or more"]),
            ({"idle_timeout": 0}, ["idle_timeout 0", "None"]),
            ({"connect_timeout": "10"}, ["connect_timeout '10'", "seconds"]),
            ({"buffer_size": None}, ["buffer_size None", "bytes"]),
            ({"max_body_size": -5}, ["max_body_size -5", "bytes"]),
            ({"trusted_proxies": ("10.0.0.1/8",)}, ["trusted_proxies", "'10.0.0.0/8'"]),
            ({"via": "a b"}, ["via 'a b'"]),
            ({"cookie_path": "/a; Secure"}, ["cookie_path"]),
            ({"rewrite_request": "f"}, ["rewrite_request 'f'", "function"]),
            ({"preserve_host_header": "yes"}, ["preserve_host_header 'yes'", "True or False"]),
            ({"custom_http_methods": "PURGE"}, ["custom_http_methods 'PURGE'", "('PROPFIND',)"]),
            ({"custom_http_methods": ("CONNECT",)}, ["CONNECT"]),
            ({"status_callbacks": {404: None}}, ["status_callbacks[404]"]),
            ({"status_callbacks": {"6xx": print}}, ["'6xx'", "'5xx'"]),
            ({"status_callbacks": [404]}, ["status_callbacks [404]"]),
            ({"error_callback": lambda: None}, ["error_callback", "(error)"]),
            ({"idle_timeout": float("inf")}, ["idle_timeout inf", "None"]),
            ({"error_callback": (print, 5)}, ["error_callback", "(f, args)"]),
            ({"client_options": {"unix_socket": Path("/run/a")}}, ["unix_socket", "string"]),
            ({"client_options": {"ca_certs": 3.5}}, ["ca_certs 3.5", "string"]),
            ({"client_options": {"max_idle_seconds": 10**12}}, ["max_idle_seconds"]),
            ({"client_options": {"max_connection_seconds": 0}}, ["max_connection_seconds", "such as 100"]),
            (
                {"client": "simple", "client_options": {"max_connection_seconds": None}},
                ["max_connection_seconds", "None"],
            ),
            ({"client": "httpx", "client_options": {"max_idle_seconds": None}}, ["max_idle_seconds", "None"]),
            (
                {"client": "simple", "client_options": {"max_connection_seconds": 1.5}},
                ["max_connection_seconds", "such as 100"],
            ),
            ({"allowed_origins": "https://a.example"}, ["allowed_origins 'https://a.example'", "list"]),
            ({"allowed_origins": ["https://a.example/"]}, ["'https://a.example/' is not an origin", "https://app"]),
            ({"allowed_origins": ["a.example"]}, ["'a.example' is not an origin", "https://app"]),
            ({"allowed_origins": ["*"]}, ["'*' is not an origin"]),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_the_message_names_mount_option_and_cure(self, options, words):
        with pytest.raises(OptionError) as caught:
            mount("/api", **{"upstream": URL, **options})
        message = str(caught.value)
        assert message.startswith('mount("/api"): ')
        assert [word for word in words if word not in message] == []

    @pytest.mark.parametrize(("name", "value"), list(useless_values()))
    def test_no_option_takes_what_it_cannot_use(self, name, value):
        with pytest.raises(OptionError) as caught:
            mount("/api", **{"upstream": URL, name: value})
        message = str(caught.value)
        assert message.startswith('mount("/api"): ')
        # What is wrong, and after it the cure.
        wrong, _, cure = message.removeprefix('mount("/api"): ').partition(";")
        assert name in wrong
        assert cure

    @pytest.mark.parametrize("prefix", ["api", "", "/a?b", "/a*", "/a b"])
    def test_a_prefix_is_a_literal_path(self, prefix):
        with pytest.raises(OptionError, match="prefix"):
            mount(prefix, URL)

    def test_a_prefix_is_what_clients_send(self):
        """Else it would match nothing, and its requests go elsewhere."""
        with pytest.raises(OptionError, match=re.escape("write '/%C3%A4/a%2Fb'")):
            mount("/ä/a%2Fb", URL)
        mount("/%C3%A4/a%2Fb", URL)


class TestSpellings:
    def test_methods_may_come_from_a_generator(self):
        options = ProxyOptions(upstream=URL, custom_http_methods=(name for name in ("PROPFIND",)))
        assert "PROPFIND" in options.methods

    def test_a_version_may_be_a_number_as_the_command_line_reads_it(self):
        ProxyOptions.parse("here", {"upstream": URL, "client_options": {"http_version": 2}})
        assert CurlOptions.parse("curl", {"http_version": 2}).http_version == "2"


class TestStatusCallbacks:
    def test_the_narrowest_key_wins(self):
        keys = ["*", "5xx", range(500, 505), 502]
        options = ProxyOptions.parse("test", {"upstream": URL, "status_callbacks": dict.fromkeys(keys, str)})
        widths = [len(statuses) for statuses, _ in options._statuses]
        assert widths == [1, 5, 100, 500]

    def test_no_key_is_no_callback(self):
        options = ProxyOptions.parse("test", {"upstream": URL, "status_callbacks": {404: str}})
        assert options.status_callback(404) is str
        assert options.status_callback(200) is None


class TestTrust:
    @pytest.mark.parametrize(
        ("trusted", "address", "believed"),
        [
            ((), "127.0.0.1", False),
            ("*", "192.0.2.1", True),
            (("10.0.0.0/8",), "10.1.2.3", True),
            (("10.0.0.0/8",), "11.1.2.3", False),
            (("::1",), "::1", True),
            (("10.0.0.0/8",), "0.0.0.0x", False),
            (("10.0.0.0/8",), None, False),
        ],
    )
    def test_only_the_networks_named(self, trusted, address, believed):
        assert ProxyOptions.parse("test", {"upstream": URL, "trusted_proxies": trusted}).trusts(address) is believed
