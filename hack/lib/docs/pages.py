"""All tables, by the name that a page uses."""

from __future__ import annotations

from hack.lib.docs import attributes, classes, container, flags, metrics, params, policy, refusals, source, taints

PAGES = source.ROOT / "docs/reference"

TABLES = {
    "attributes": attributes.attributes,
    "attributes-cel": attributes.attributes_in_cel,
    "capacities": attributes.capacities,
    "capacities-cel": attributes.capacities_in_cel,
    "classes": classes.classes,
    "commands": flags.synopsis,
    "container": container.environment,
    "exit-codes": flags.exit_codes,
    "flags": flags.flags,
    "metric-labels": metrics.labels,
    "metrics": metrics.metrics,
    "params": params.keys,
    "params-devices": params.devices_that_take,
    "policy-document": policy.document,
    "policy-match": policy.match,
    "policy-section": policy.section,
    "policy-shared": policy.shared,
    "refusals-devices": refusals.devices,
    "refusals-node": refusals.node,
    "refusals-params": refusals.parameters,
    "taints": taints.taints,
}
