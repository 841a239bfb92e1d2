"""Deletion and eviction of pods, as in the real API server.

A pod on a node goes when its kubelet says so: a deletion only marks it. An eviction is a deletion that a PodDisruptionBudget
may refuse (kubernetes, pkg/registry/core/pod/storage/eviction.go).
"""

from __future__ import annotations

from gpuslice.core.json import Body
from gpuslice.standin.store import Key, RefusalError, Store, now_text


def delete(store: Store, key: Key, options: Body, *, dry: bool = False) -> Body:
    """Delete a pod with these DeleteOptions."""
    old = store.get(key)
    expected = options.get("preconditions") or {}
    if not (old.get("spec") or {}).get("nodeName") or options.get("gracePeriodSeconds") == 0:
        return store.delete(key, expected, dry=dry)
    if wanted := expected.get("uid"):
        store.expect(key, {"uid": wanted})
    if "deletionTimestamp" in old["metadata"]:
        return old
    return store.mark(key, {"deletionTimestamp": now_text(), "deletionGracePeriodSeconds": 30})


def evict(store: Store, key: Key, eviction: Body) -> Body:
    """Evict a pod. 429 if a budget does not allow it now."""
    options = eviction.get("deleteOptions") or {}
    with store.changed:
        pod = store.get(key)
        budgets = [
            budget
            for _, budget in store.items("poddisruptionbudgets", key.namespace, lambda _: True)[0]
            if selected(pod, (budget.get("spec") or {}).get("selector") or {})
        ]
        if len(budgets) > 1:
            text = "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support."
            raise RefusalError(500, "", text)
        for budget in budgets:
            _allow(budget)
        delete(store, key, options)
    return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201}


def selected(body: Body, selector: Body) -> bool:
    """Whether the labels of an object are those of this selector. An empty selector selects everything."""
    labels = body["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items())


def _allow(budget: Body) -> None:
    status, name = budget.get("status") or {}, budget["metadata"]["name"]
    if status.get("disruptionsAllowed", 0) > 0:
        return
    needs, has = status.get("desiredHealthy", 1), status.get("currentHealthy", 1)
    cause = f"The disruption budget {name} needs {needs} healthy pods and has {has} currently"
    raise RefusalError(
        429,
        "TooManyRequests",
        "Cannot evict pod as it would violate the pod's disruption budget.",
        details={"causes": [{"reason": "DisruptionBudget", "message": cause}]},
    )
