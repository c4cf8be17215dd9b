"""What vLLM's check of API keys does, as 0.27.1 and 0.32.0 do it, under vLLM's name."""

from starlette.datastructures import Headers
from starlette.responses import JSONResponse

GUARDED = ("/v1", "/v2", "/inference", "/cohere")


class AuthenticationMiddleware:
    """Admits a request by the key in its first Authorization, on the routes that it guards."""

    def __init__(self, app, tokens):
        self.app, self.tokens = app, tokens

    def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket") or scope.get("method") == "OPTIONS":
            return self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        scheme, _, key = (Headers(scope=scope).get("Authorization") or "").partition(" ")
        is_admitted = scheme.lower() == "bearer" and key in self.tokens
        if not path.startswith(GUARDED) or is_admitted:
            return self.app(scope, receive, send)
        return JSONResponse({"error": "Unauthorized"}, status_code=401)(scope, receive, send)


class OfAnother(AuthenticationMiddleware):
    """The same check, in a package that is not vLLM's."""


OfAnother.__name__ = AuthenticationMiddleware.__name__
AuthenticationMiddleware.__module__ = "vllm.entrypoints.some_module"
