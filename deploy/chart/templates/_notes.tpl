{{/* Nodes that match nodeSelector and affinity, for NOTES.txt: names, one a line. */}}
{{- define "gpuslice.matching-nodes" }}
{{- range $node := .nodes }}
{{- $labels := $node.metadata.labels | default dict }}
{{- $fits := true }}
{{- range $key, $value := $.Values.nodeSelector }}
{{- if ne (get $labels $key) $value }}{{ $fits = false }}{{ end }}
{{- end }}
{{- with include "gpuslice.node-terms" $ | fromJsonArray }}
{{- $any := false }}
{{- range $term := . }}
{{- if include "gpuslice.term-fits" (dict "term" $term "labels" $labels "name" $node.metadata.name) }}{{ $any = true }}{{ end }}
{{- end }}
{{- if not $any }}{{ $fits = false }}{{ end }}
{{- end }}
{{- if $fits }}
{{ $node.metadata.name }}
{{- end }}
{{- end }}
{{- end }}

{{/* The required terms of the node affinity as JSON; simulated cards ignore `affinity`. */}}
{{- define "gpuslice.node-terms" -}}
{{- $affinity := ternary dict (.Values.affinity | default dict) (empty .Values.simulate | not) }}
{{- $required := dig "requiredDuringSchedulingIgnoredDuringExecution" dict ($affinity.nodeAffinity | default dict) | default dict }}
{{- $required.nodeSelectorTerms | default list | toJson }}
{{- end }}

{{/* "fits" if the labels of a node fit one term, as the scheduler reads it: all expressions, and never an empty term. */}}
{{- define "gpuslice.term-fits" }}
{{- $labels := .labels }}
{{- $fits := or .term.matchExpressions .term.matchFields | empty | not }}
{{- range .term.matchExpressions }}
{{- $there := hasKey $labels .key }}{{ $value := get $labels .key }}{{ $in := and $there (has $value (.values | default list)) }}
{{- $holds := dict "In" $in "NotIn" (not $in) "Exists" $there "DoesNotExist" (not $there) }}
{{- if has .operator (list "Gt" "Lt") }}
{{- $than := first .values | int64 }}
{{- $_ := set $holds .operator (and $there (ternary (gt (int64 $value) $than) (lt (int64 $value) $than) (eq .operator "Gt"))) }}
{{- end }}
{{- if not (get $holds .operator) }}{{ $fits = false }}{{ end }}
{{- end }}
{{- range .term.matchFields }}
{{- if ne (has $.name .values) (eq .operator "In") }}{{ $fits = false }}{{ end }}
{{- end }}
{{- if $fits }}fits{{ end }}
{{- end }}

{{/* Taints of these nodes that keep the driver away, one line for each: "gpu-1: dedicated=gpu:NoSchedule". Kubernetes itself
sets those of node.kubernetes.io, and lets a DaemonSet tolerate them. */}}
{{- define "gpuslice.untolerated" }}
{{- range $node := .nodes }}
{{- range $taint := ($node.spec).taints }}
{{- if and (has $node.metadata.name $.names) (has $taint.effect (list "NoSchedule" "NoExecute")) (not (hasPrefix "node.kubernetes.io/" $taint.key)) }}
{{- $tolerated := false }}
{{- range $.Values.tolerations }}
{{- $effect := or (empty .effect) (eq (toString .effect) $taint.effect) }}
{{- $key := or (and (empty .key) (eq (toString .operator) "Exists")) (eq (toString .key) $taint.key) }}
{{- $value := or (eq (toString .operator) "Exists") (eq (.value | default "") ($taint.value | default "")) }}
{{- if and $effect $key $value }}{{ $tolerated = true }}{{ end }}
{{- end }}
{{- if not $tolerated }}
{{ $node.metadata.name }}: {{ $taint.key }}{{ with $taint.value }}={{ . }}{{ end }}:{{ $taint.effect }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* A command that gives a node the labels which the chart expects. */}}
{{- define "gpuslice.label-command" -}}
{{- $labels := list }}
{{- range $key, $value := .Values.nodeSelector }}{{ $labels = append $labels (printf "%s=%s" $key $value) }}{{ end }}
{{- with include "gpuslice.node-terms" . | fromJsonArray }}
{{- range (last .).matchExpressions }}
{{- if has .operator (list "In" "Exists") }}
{{- $labels = append $labels (printf "%s=%s" .key (.values | default (list "true") | first)) }}
{{- end }}
{{- end }}
{{- end }}
kubectl label node NODE {{ join " " $labels }}
{{- end }}

{{/* What the labels have to be, one line for each alternative. */}}
{{- define "gpuslice.expected-labels" }}
{{- range $key, $value := .Values.nodeSelector }}
    {{ $key }}={{ $value }}  (nodeSelector)
{{- end }}
{{- range $index, $term := include "gpuslice.node-terms" . | fromJsonArray }}
    {{ if $index }}or {{ end }}{{ range $at, $one := $term.matchExpressions }}{{ if $at }} and {{ end }}{{ $one.key }}
{{- if eq $one.operator "In" }}={{ join "|" $one.values }}{{ else }} {{ $one.operator }} {{ join "|" $one.values }}{{ end }}
{{- end }}  (affinity)
{{- end }}
{{- end }}
