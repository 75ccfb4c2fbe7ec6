"""Bytes on the wire and requests of the first page after sign-in, in a real browser with an empty cache.

    python benchmarks/page_weight.py [--json] URL EMAIL PASSWORD

Counts every response body as it was transferred (compressed) with its headers, until the page has been
quiet for a second; what the sockets carry is counted apart. Exits 1 above the aim.
"""

from __future__ import annotations

import argparse
import json
import sys

from playwright.sync_api import Page, sync_playwright

AIM_BYTES = 120 * 1000
CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def sign_in(page: Page, url: str, email: str, password: str) -> None:
    page.goto(f"{url}/accounts/login/")
    page.fill("input[name=login]", email)
    page.fill("input[name=password]", password)
    page.click("main button[type=submit]")
    page.wait_for_url(lambda there: "/accounts/login/" not in there)


def measure(url: str, email: str, password: str) -> dict[str, object]:
    """``bytes`` transferred, ``requests``, the largest of them, and what the sockets sent in three seconds."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        context = browser.new_context(viewport={"width": 1400, "height": 900})
        page = context.new_page()
        sign_in(page, url, email, password)
        session = context.new_cdp_session(page)
        session.send("Network.enable")
        session.send("Network.setCacheDisabled", {"cacheDisabled": True})
        names: dict[str, str] = {}
        sizes: dict[str, int] = {}
        socket_bytes = [0]

        def frame(event: dict) -> None:
            socket_bytes[0] += len(event["response"]["payloadData"].encode())

        session.on("Network.requestWillBeSent", lambda e: names.__setitem__(e["requestId"], e["request"]["url"]))
        session.on("Network.loadingFinished", lambda e: sizes.__setitem__(e["requestId"], int(e["encodedDataLength"])))
        session.on("Network.webSocketFrameReceived", frame)
        page.goto(f"{url}/")
        page.wait_for_timeout(3000)
        found = sorted(((size, names.get(i, "?").removeprefix(url)) for i, size in sizes.items()), reverse=True)
        browser.close()
    return {
        "bytes": sum(size for size, _ in found),
        "requests": len(found),
        "largest": [{"bytes": size, "path": path} for size, path in found[:10]],
        "socket_bytes_in_3_s": socket_bytes[0],
        "aim_bytes": AIM_BYTES,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("url")
    parser.add_argument("email")
    parser.add_argument("password")
    asked = parser.parse_args()
    found = measure(asked.url.rstrip("/"), asked.email, asked.password)
    if asked.json:
        print(json.dumps(found))
    else:
        print(f"first page: {found['bytes']} bytes in {found['requests']} requests (aim {AIM_BYTES})")
        for one in found["largest"]:  # type: ignore[attr-defined]
            print(f"  {one['bytes']:>7}  {one['path']}")
        print(f"sockets: {found['socket_bytes_in_3_s']} bytes in 3 s")
    return 0 if int(str(found["bytes"])) <= AIM_BYTES else 1


if __name__ == "__main__":
    sys.exit(main())
