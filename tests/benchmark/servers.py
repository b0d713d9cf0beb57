"""Proxies that are programs of their own: nginx, HAProxy, Caddy, Envoy and Traefik, one worker or thread each."""

from __future__ import annotations

import os

from tests.benchmark.candidate import Candidate, Command, Finder, Place, said_version

# For all of them: stream both ways without buffering, keep connections to the upstream, tunnel websockets, log nothing
# of requests, and have no timeout that a stream would meet.

NGINX = """
daemon off;
worker_processes 1;
%(user)s
pid nginx.pid;
error_log stderr error;
events { worker_connections 8192; }
http {
    access_log off;
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    client_max_body_size 0;
    keepalive_requests 1000000000;
    upstream behind {
        server 127.0.0.1:%(upstream)d;
        keepalive 512;
        keepalive_requests 1000000000;
    }
    map $http_upgrade $hop {
        default "";
        websocket upgrade;
    }
    server {
        listen 127.0.0.1:%(port)d backlog=1024;
        location / {
            proxy_pass http://behind;
            proxy_http_version 1.1;
            proxy_buffering off;
            proxy_buffer_size 16k;
            proxy_busy_buffers_size 16k;
            proxy_request_buffering off;
            proxy_read_timeout 1h;
            proxy_set_header Host $http_host;
            proxy_set_header Connection $hop;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Forwarded-Proto $scheme;
        }
    }
}
"""

HAPROXY = """
global
    nbthread 1
    maxconn 8192
defaults
    mode http
    option forwardfor
    # Without this a chunk waits for more, up to a fifth of a second.
    option http-no-delay
    http-reuse always
    timeout connect 10s
    timeout client 1h
    timeout server 1h
    timeout tunnel 1h
frontend downstream
    bind 127.0.0.1:%(port)d backlog 1024
    use_backend behind
backend behind
    server one 127.0.0.1:%(upstream)d
"""

CADDY = """
{
    admin off
    auto_https off
    persist_config off
    log {
        level ERROR
    }
    %(options)s
}
http://:%(port)d {
    bind 127.0.0.1
    reverse_proxy 127.0.0.1:%(upstream)d {
        transport http {
            keepalive_idle_conns_per_host 512
        }
    }
}
"""

ENVOY = """
static_resources:
  listeners:
    - address: { socket_address: { address: 127.0.0.1, port_value: %(port)d } }
      filter_chains:
        - filters:
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": "type.googleapis.com/envoy.extensions.filters.network.\
http_connection_manager.v3.HttpConnectionManager"
                stat_prefix: downstream
                use_remote_address: true
                stream_idle_timeout: 0s
                upgrade_configs: [{ upgrade_type: websocket }]
                http_filters:
                  - name: envoy.filters.http.router
                    typed_config:
                      "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router
                route_config:
                  virtual_hosts:
                    - name: everything
                      domains: ["*"]
                      routes: [{ match: { prefix: / }, route: { cluster: behind, timeout: 0s } }]
  clusters:
    - name: behind
      type: STATIC
      connect_timeout: 10s
      load_assignment:
        cluster_name: behind
        endpoints:
          - lb_endpoints:
              - endpoint: { address: { socket_address: { address: 127.0.0.1, port_value: %(upstream)d } } }
"""

TRAEFIK = """
http:
  routers:
    everything: { rule: "PathPrefix(`/`)", entryPoints: [downstream], service: behind }
  services:
    behind:
      loadBalancer:
        passHostHeader: true
        responseForwarding: { flushInterval: -1ms }
        serversTransport: kept
        servers: [{ url: "http://127.0.0.1:%(upstream)d" }]
  serversTransports:
    kept: { maxIdleConnsPerHost: 512 }
"""

# Go programs take as many cores as there are, pinned or not.
ONE_CORE = {"GOMAXPROCS": "1"}


def filled(place: Place, template: str, **more: str) -> str:
    return template % {"port": place.port, "upstream": place.upstream, **more}


def nginx(find: Finder) -> Candidate:
    program = find.program("nginx")

    def command(place: Place) -> Command:
        # Under root its worker would be nobody, who may not enter a temporary directory.
        user = "" if os.geteuid() else "user root;"
        path = place.write("nginx.conf", filled(place, NGINX, user=user))
        return Command([program, "-e", "stderr", "-p", str(place.directory), "-c", path])

    return Candidate("nginx", command, f"nginx {said_version(program, '-v')}", everywhere=True)


def haproxy(find: Finder) -> Candidate:
    program = find.program("haproxy")

    def command(place: Place) -> Command:
        return Command([program, "-db", "-f", place.write("haproxy.cfg", filled(place, HAPROXY))])

    return Candidate("HAProxy", command, f"HAProxy {said_version(program, '-v')}")


def caddy(find: Finder, options: str = "") -> Candidate:
    program = find.program("caddy")

    def command(place: Place) -> Command:
        home = dict.fromkeys(("XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(place.directory))
        path = place.write("Caddyfile", filled(place, CADDY, options=options))
        return Command([program, "run", "--adapter", "caddyfile", "--config", path], home | ONE_CORE)

    return Candidate("Caddy", command, f"Caddy {said_version(program, 'version')}")


def envoy(find: Finder) -> Candidate:
    program = find.program("envoy")

    def command(place: Place) -> Command:
        path = place.write("envoy.yaml", filled(place, ENVOY))
        return Command([program, "-c", path, "--concurrency", "1", "--disable-hot-restart", "--log-level", "error"])

    return Candidate("Envoy", command, f"Envoy {said_version(program, '--version')}")


def traefik(find: Finder) -> Candidate:
    program = find.program("traefik")

    def command(place: Place) -> Command:
        options = {
            "entrypoints.downstream.address": f"127.0.0.1:{place.port}",
            "providers.file.filename": place.write("behind.yml", filled(place, TRAEFIK)),
            "global.checknewversion": "false",
            "global.sendanonymoususage": "false",
            "log.level": "ERROR",
        }
        return Command([program, *(f"--{name}={value}" for name, value in options.items())], ONE_CORE)

    return Candidate("Traefik", command, f"Traefik {said_version(program, 'version')}")
