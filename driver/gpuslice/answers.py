"""What an answer of the API server says, and what it does not say. Refusals become errors here and nowhere else.

The driver concludes nothing from an answer that does not say so. A proxy, an old server or a broken server also answers
404, and that says nothing about the object. So only a `Status` object of the API counts. "It does not exist" counts only if
the details of the Status name the object (apimachinery, `errors.NewNotFound`: a 404 for an unknown path or kind names none).
"""

from __future__ import annotations

from dataclasses import dataclass

from gpuslice.core import json as bodies
from gpuslice.core.json import Body, UncheckedBody
from gpuslice.errors import ApiError, ConflictError, ExpiredError, LastingApiError, NotFoundError

_GROUPS = {"nodes": "", "selfsubjectaccessreviews": "authorization.k8s.io"}  # of all other resources: our API's group
_CHECK = "check the API server and the proxies before it"


@dataclass(frozen=True, slots=True)
class Call:
    """A request, in the words of a ClusterRole."""

    verb: str  # a verb of RBAC
    resource: str
    path: str
    name: str = ""  # the name of the object, if the request is about one object

    @property
    def method(self) -> str:
        return {"create": "POST", "update": "PUT", "delete": "DELETE"}.get(self.verb, "GET")

    @property
    def group(self) -> str:
        return _GROUPS.get(self.resource, "resource.k8s.io")

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}"


def odd(server: str, what: str) -> ApiError:
    """The error for an answer that does not fit the request."""
    return ApiError(f"the API server at {server} answered {what}; {_CHECK}")


def refusal(call: Call, status: int, data: bytes) -> ApiError:
    """The error for an answer with an HTTP status of 300 or more."""
    text, body = bodies.message(data), _status(data, status)
    if status == 429:  # the API server's own answer is no Status (apiserver, filters/maxinflight.go)
        return ApiError(f"the API server is too busy for {call}: {text}; the next try may succeed", status)
    if body is None or (status == 404 and not _names(body, call)):
        return ApiError(f"{call} was answered with status {status}, which does not say why; {_CHECK}: {text}", status)
    return _refused(call, status, text)


def event_refusal(call: Call, thing: Body) -> ApiError:
    """The error for an ERROR event of a watch. `thing` is the object of the event."""
    code, text = bodies.status(thing)
    return _refused(call, 500 if code == 404 else code, text)


def _status(data: bytes, code: int) -> UncheckedBody | None:
    """The Status object of the answer. None if the answer is no Status, or has another code than the HTTP status."""
    try:
        body = bodies.parse_object(data)
    except ValueError:
        return None
    return body if body.get("kind") == "Status" and body.get("code") == code else None


def _names(status: UncheckedBody, call: Call) -> bool:
    details = status.get("details")
    if not call.name or not isinstance(details, dict):
        return False
    # A Status of the core group has no `group`.
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
