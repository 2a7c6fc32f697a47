"""The live page at `/`: one file, which asks this server's own routes and nobody else."""

from __future__ import annotations

import secrets
from importlib import resources

from fastapi import FastAPI
from fastapi.responses import HTMLResponse


def add_page(app: FastAPI) -> None:
    """Give `app` the page. Its policy lets the browser run that file's own script alone, and ask this server alone."""
    text = resources.files("pregate.router.doors.http.page").joinpath("index.html").read_text("utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        nonce = secrets.token_urlsafe(16)
        policy = f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'"
        policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        return HTMLResponse(text.replace("NONCE", nonce), headers=headers | {"Referrer-Policy": "no-referrer"})
