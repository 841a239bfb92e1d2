"""The commands on the pages for operators, and which test runs each of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from tests.kit import commands, markdown
from tests.kit.markdown import ROOT

PAGES = [
    path
    for name in ("install", "upgrade", "uninstall", "troubleshooting")
    if (path := ROOT / f"docs/{name}.md").exists()
]
NOT_RUN = "## What of this page was not run"

AS_THEY_ARE = "tests/e2e/test_pages.py::test_the_commands_of_the_pages_run_as_they_are"
INSTALLED = "tests/e2e/test_pages_installed.py::test_the_commands_about_an_installed_driver_run_as_they_are"
_HELM = "tests/e2e/test_operators.py::test_pods_that_came_before_the_driver_start_when_it_is_installed"
_RULE = "tests/e2e/test_out_of_service.py::"
_COUNTED = f"{_RULE}test_a_rule_without_effect_counts_the_pods_that_would_be_evicted"
_EVICTED = f"{_RULE}test_pods_of_a_card_out_of_service_are_evicted_and_new_ones_get_the_other_card_until_the_rule_goes"
_KEPT = f"{_RULE}test_without_new_claims_the_pods_of_the_card_run_on"
_ON_THE_NODE = "tests/e2e/test_sharing.py::test_the_commands_of_the_driver_show_on_the_node_who_holds_what"
_REMOVED = "tests/e2e/test_uninstall.py::"
_IDLE = f"{_REMOVED}test_an_idle_driver_leaves_nothing_on_the_node_and_in_the_api"
_REFUSED = f"{_REMOVED}test_with_a_pod_that_has_a_claim_it_is_refused_and_can_be_upgraded_again"
_FORCED = f"{_REMOVED}test_by_force_pods_of_all_modes_are_evicted_and_nothing_is_left"
_WITHOUT_HELM = f"{_REMOVED}test_without_helm_the_same_job_is_applied_and_waited_for"
_GONE = f"{_REMOVED}test_a_pod_that_hangs_without_driver_ends_when_it_is_installed_again"
_NAMESPACE = "--namespace gpuslice-system"
_OURS = "--field-selector spec.driver=gpuslice.dev"
_PATCH = "kubectl patch devicetaintrule card-out-of-service --type=merge -p "

# Each command of the pages that a test runs, and the test. AS_THEY_ARE and INSTALLED run theirs in this order.
RUN = {
    "kubectl apply -f deploy/namespace.yaml": AS_THEY_ARE,
    "kubectl get pods -n gpuslice-system -o wide": AS_THEY_ARE,
    f"kubectl get resourceslices {_OURS}": AS_THEY_ARE,
    f"kubectl get resourceslices {_OURS} -o jsonpath='{{range .items[*].spec.devices[*].taints[*]}}"
    '{.key}={.value}{"\\n"}{end}\'': AS_THEY_ARE,
    "kubectl get pod POD": AS_THEY_ARE,
    "kubectl describe pod POD": AS_THEY_ARE,
    "kubectl get resourceclaims": AS_THEY_ARE,
    "kubectl get resourceclaim CLAIM -o yaml": AS_THEY_ARE,
    "kubectl apply -f deploy/examples/whole-gpu.yaml": AS_THEY_ARE,
    "kubectl wait --for=jsonpath='{.status.phase}'=Succeeded pod/whole-gpu --timeout=2m": AS_THEY_ARE,
    "kubectl logs whole-gpu": AS_THEY_ARE,
    "kubectl delete -f deploy/examples/whole-gpu.yaml": AS_THEY_ARE,
    f"helm uninstall gpuslice {_NAMESPACE}": _IDLE,
    f"helm uninstall gpuslice {_NAMESPACE} --no-hooks": _GONE,
    f"helm rollback gpuslice REVISION {_NAMESPACE}": _REFUSED,
    f"kubectl logs job/gpuslice-uninstall {_NAMESPACE}": _REFUSED,
    f"kubectl annotate daemonset/gpuslice {_NAMESPACE} gpuslice.dev/uninstall=evict --overwrite": _FORCED,
    "kubectl apply -f deploy/uninstall": _WITHOUT_HELM,
    f"kubectl wait --for=condition=Complete job/gpuslice-uninstall {_NAMESPACE} --timeout=5m": _WITHOUT_HELM,
    "kubectl delete --ignore-not-found -f deploy/uninstall -f deploy": _WITHOUT_HELM,
    "kubectl delete -f deploy": _WITHOUT_HELM,
    "gpuslice cleanup": "tests/uninstall/test_cleanup.py::test_the_command_says_what_it_removed_or_why_not",
    "kubectl logs -n gpuslice-system daemonset/gpuslice": INSTALLED,
    "kubectl exec -n gpuslice-system POD -- gpuslice devices": INSTALLED,
    "kubectl exec -n gpuslice-system POD -- gpuslice claims": INSTALLED,
    "kubectl get --raw /api/v1/namespaces/gpuslice-system/pods/POD:9510/proxy/readyz": INSTALLED,
    "kubectl label namespace gpuslice-system pod-security.kubernetes.io/enforce=privileged": INSTALLED,
    "helm upgrade gpuslice deploy/chart --namespace gpuslice-system --reset-then-reuse-values --wait": INSTALLED,
    "kubectl rollout status -n gpuslice-system daemonset/gpuslice": INSTALLED,
    "helm rollback gpuslice --namespace gpuslice-system --wait": INSTALLED,
    "kubectl delete pod -n gpuslice-system -l app.kubernetes.io/name=gpuslice-mps-supervisor "
    "--field-selector spec.nodeName=NODE": INSTALLED,
    "kubectl drain NODE --ignore-daemonsets --delete-emptydir-data": INSTALLED,
    "kubectl uncordon NODE": INSTALLED,
    "helm install gpuslice deploy/chart --namespace gpuslice-system --set image.repository=REGISTRY/gpuslice": _HELM,
    "hack/image": "tests/deploy/test_image.py::test_the_command_of_the_image_starts",
    "gpuslice devices": _ON_THE_NODE,
    "gpuslice claims": _ON_THE_NODE,
    "gpuslice preflight": "tests/test_preflight.py::"
    "test_a_node_without_a_gpu_or_an_nvidia_driver_is_ready_because_the_driver_waits_for_them",
    "kubectl apply -f deploy/examples/operator/card-out-of-service.yaml": _COUNTED,
    "kubectl get devicetaintrule card-out-of-service -o jsonpath='{.status.conditions[*].message}'": _COUNTED,
    f'{_PATCH}\'{{"spec":{{"taint":{{"effect":"NoSchedule"}}}}}}\'': _KEPT,
    f'{_PATCH}\'{{"spec":{{"taint":{{"effect":"NoExecute"}}}}}}\'': _EVICTED,
    "kubectl delete devicetaintrule card-out-of-service": _EVICTED,
}

_FILTERS = ("grep", "sort", "uniq")  # behind a pipe of a command


def run_by(test: str) -> list[str]:
    return [command for command, runs in RUN.items() if runs == test]


def found(page: Path) -> Iterator[tuple[str, str]]:
    """(place, command) of every command in a block, and of every one that a sentence names."""
    for block in before_the_table(page):
        for command in commands.lines(block.text.partition("\n\n")[0]):
            if not command.startswith(_FILTERS):
                yield str(block), re.sub(" +", " ", command)
    last = end(page)
    for number, span in markdown.spans(page):
        if number < last:
            yield from ((f"{markdown.name(page)}:{number}", command) for command in commands.commands(span))


def before_the_table(page: Path) -> Iterator[markdown.CodeBlock]:
    return itertools.takewhile(lambda block: block.line < end(page), markdown.blocks(page))


def end(page: Path) -> int:
    """The line where the table of what is not run begins."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return lines.index(NOT_RUN) + 1 if NOT_RUN in lines else len(lines) + 1


def not_run(page: Path) -> dict[str, str]:
    """Each command of the page's own table, and why no test runs it."""
    rows = "\n".join(page.read_text(encoding="utf-8").splitlines()[end(page) :])
    return dict(re.findall(r"^\| `([^`]+)` \| ([^|]+) \|$", rows, re.MULTILINE))


def fits(pattern: str, command: str) -> bool:
    """Whether a command is the one of a table. Either of them may be shortened: by … at its end, or in a sentence."""
    start, shortened, _ = pattern.partition("…")
    return command == pattern or (bool(shortened) and command.startswith(start.rstrip()))
