"""What an answer of the API server says, and what it does not: the one place where a refusal becomes an error.

Nothing is concluded from an answer that does not say so. A proxy, an old server or a broken one also answers 404, and then
nothing is known of the object. So only a `Status` object of the API counts; and "it does not exist" counts only where its
details name the object (apimachinery, `errors.NewNotFound`: a 404 for an unknown path or kind names none).
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuslice.core import json as bodies
from gpuslice.core.json import Body, UncheckedBody
from gpuslice.errors import ApiError, ConflictError, ExpiredError, LastingApiError, NotFoundError

_CHECK = "check the API server and the proxies before it"


@dataclass(frozen=True, slots=True)
class Call:
    """A request as a person with a ClusterRole in hand would name it."""

    verb: str  # Kubernetes' word, as RBAC has it
    resource: str
    path: str
    name: str = ""  # of the one object that is meant

    @property
    def method(self) -> str:
        return {"create": "POST", "update": "PUT", "delete": "DELETE"}.get(self.verb, "GET")

    @property
    def group(self) -> str:
        return "" if self.resource == "nodes" else "resource.k8s.io"

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


def odd(server: str, what: str) -> ApiError:
    """The error for an answer that is none to the question."""
    return ApiError(f"the API server at {server} answered {what}; {_CHECK}")


def refusal(call: Call, status: int, data: bytes) -> ApiError:
    """The error for an answer with an HTTP status from 300 on."""
    text, body = bodies.message(data), _status(data, status)
    if status == 429:  # the API server's own one is no Status (apiserver, filters/maxinflight.go)
        return ApiError(f"the API server is too busy for {call}: {text}; the next try may succeed", status)
    if body is None or (status == 404 and not _names(body, call)):
        return ApiError(f"{call} was answered with status {status}, which does not say why; {_CHECK}: {text}", status)
    return _refused(call, status, text)


def event_refusal(call: Call, thing: Body) -> ApiError:
    """The error for the object of an ERROR event in a watch."""
    code, text = bodies.status(thing)
    return _refused(call, 500 if code == 404 else code, text)


def _status(data: bytes, code: int) -> UncheckedBody | None:
    """The Status object of the API, if the answer is one for this HTTP status."""
    try:
        body = bodies.parse_object(data)
    except ValueError:
        return None
    return body if body.get("kind") == "Status" and body.get("code") == code else None


def _names(status: UncheckedBody, call: Call) -> bool:
    details = status.get("details")
    if not call.name or not isinstance(details, dict):
        return False
    # The core group is spelled by leaving it out.
    named = (details.get("group", ""), details.get("kind"), details.get("name"))
    return named == (call.group, call.resource, call.name)


def _refused(call: Call, status: int, text: str) -> ApiError:
    match status:
        case 404:
            return NotFoundError(f"{call}: {text}", status)
        case 409:
            return ConflictError(f"{call}: {text}", status)
        case 410:
            return ExpiredError(f"{call}: {text}", status)
        case 401:
            return LastingApiError(
                f"the API server refused the driver's credentials ({call}: {text}); check the token", status
            )
        case 403:
            return ApiError(
                f"the API server forbids {call}: {text}; add "
                f'{{apiGroups: ["{call.group}"], resources: ["{call.resource}"], verbs: ["{call.verb}"]}} '
                "to the ClusterRole of this service account",
                status,
            )
        case _:
            return ApiError(f"the API server answered {call} with status {status}: {text}", status)
