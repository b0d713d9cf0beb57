"""Programs that we did not write, before and behind the proxy: nginx, curl, git, browsers and what they show."""
