"""Packaging of tornado_proxy: what it needs to run, and what each extra adds."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
# For response.decode() to know br and zstd.
CODINGS = ["brotli>=1.2", "backports.zstd; python_version < '3.14'"]
# For the server in front; libcurl has its own.
HTTP2 = ["h2>=4.3"]


def version() -> str:
    """Return the version without importing the package, whose dependencies may not be installed yet."""
    source = (HERE / "tornado_proxy" / "_version.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise RuntimeError('tornado_proxy/_version.py has no line __version__ = "..."')
    return found.group(1)


def long_description() -> str:
    """Return the README, or nothing where it was not shipped."""
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="tornado_proxy",
    version=version(),
    description="A transparent, streaming reverse proxy for Tornado applications",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="tornado_proxy authors",
    license="MIT",
    packages=find_packages(include=["tornado_proxy", "tornado_proxy.*"]),
    package_data={"tornado_proxy": ["py.typed"], "tornado_proxy.demo": ["page/*"]},
    python_requires=">=3.11",
    install_requires=["tornado>=6.6", "pycurl>=7.49"],
    extras_require={
        "speed": ["uvloop; platform_system != 'Windows'"],
        "http2": HTTP2,
        "httpx": ["httpx>=0.27"],
        "aiohttp": ["aiohttp>=3.12"],
        "codings": CODINGS,
        "dev": [
            "pytest",
            "pytest-asyncio",
            "hypothesis",
            "mypy",
            "ruff",
            "types-pycurl",
            "websockets",
            "h11",
            "psutil",
            "httpx>=0.27",
            "aiohttp>=3.12",
            "starlette",
            "flask",
            "a2wsgi",
            *CODINGS,
            *HTTP2,
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "License :: OSI Approved :: MIT License",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Internet :: Proxy Servers",
        "Topic :: Internet :: WWW/HTTP :: HTTP Servers",
        "Typing :: Typed",
    ],
)
