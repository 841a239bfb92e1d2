{{/* Values come from an older chart after `helm upgrade --reuse-values`, so a value that is newer than 0.1.0 may be missing.

Values that cannot work, each refused by one sentence with its remedy. values.schema.json checks types and unknown
names before this; its errors about a pattern would name no remedy. Checks that need the cluster see nothing in `helm
template` and in Argo CD, so these refuse only what they have seen. */}}
{{- define "gpuslice.checks" }}
{{- include "gpuslice.check-release" . }}
{{- range $name := list "image" "http" "supervisor" "deviceClasses" }}
{{- if not (kindIs "map" (get $.Values $name)) }}
{{- fail (printf "%s is null, so its values are missing; leave it out, and only write the values that differ" $name) }}
{{- end }}
{{- end }}
{{- if not .Values.http.port }}
{{- fail "http.port is null and must be a port, because the kubelet asks there whether the driver is well; leave it out for 9510" }}
{{- end }}
{{- include "gpuslice.check-image" .Values.image }}
{{- range $name := list "kubeletRootDir" "cdiRoot" "nvidiaDriverRoot" }}
{{- $value := get $.Values $name }}
{{- if not (or (regexMatch "^(/[A-Za-z0-9._-]+)+$" $value) (and (eq $value "/") (eq $name "nvidiaDriverRoot"))) }}
{{- fail (printf "%s is %q and must be the whole path of a folder on the nodes, such as %s, without a slash at the end" $name $value "/var/lib/k0s/kubelet") }}
{{- end }}
{{- end }}
{{- with (.Values.apiServer).host }}
{{- if not (regexMatch "^([A-Za-z0-9.-]+|[0-9A-Fa-f:.]+)$" .) }}
{{- fail (printf "apiServer.host is %q and must be an IP address or a DNS name; write the port as apiServer.port" .) }}
{{- end }}
{{- end }}
{{- with .Values.deviceClasses }}
{{- if not (regexMatch "^([a-z0-9.-]+/[A-Za-z0-9._-]+)?$" (.extendedResourceName | default "")) }}
{{- fail (printf "deviceClasses.extendedResourceName is %q and must have a domain, such as example.com/gpu" .extendedResourceName) }}
{{- end }}
{{- range .migProfiles }}
{{- if not (regexMatch "^[1-9]g\\.[1-9][0-9]*gb$" .) }}
{{- fail (printf "deviceClasses.migProfiles has %q, but such a name has no suffix; write it like 1g.10gb, and use a claim for other profiles" .) }}
{{- end }}
{{- end }}
{{- end }}
{{- if not (regexMatch "^[A-Za-z0-9:+-]*$" (.Values.simulate | default "")) }}
{{- fail (printf "simulate is %q and must be the cards themselves, such as h100x2 or a100-40gx2+l4, because the pods have no file of yours" .Values.simulate) }}
{{- end }}
{{- include "gpuslice.check-policy" .Values.policy }}
{{- end }}

{{- define "gpuslice.check-release" }}
{{- if eq .Release.Namespace "default" }}
{{- fail "the pods of the driver are privileged, and namespace default should not allow that; make a namespace with kubectl apply -f deploy/namespace.yaml, and add --namespace gpuslice-system" }}
{{- end }}
{{- $there := lookup "rbac.authorization.k8s.io/v1" "ClusterRole" "" "gpuslice" }}
{{- $notes := dig "metadata" "annotations" dict $there | default dict }}
{{- $name := get $notes "meta.helm.sh/release-name" }}
{{- $namespace := get $notes "meta.helm.sh/release-namespace" }}
{{- if and $name (or (ne $name .Release.Name) (ne $namespace .Release.Namespace)) }}
{{- fail (printf "gpuslice is installed already, as release %s in namespace %s, and a cluster can have only one; change it with helm upgrade %s --namespace %s, or remove it first with helm uninstall %s --namespace %s" $name $namespace $name $namespace $name $namespace) }}
{{- end }}
{{- end }}

{{- define "gpuslice.check-image" }}
{{- if not .repository }}
{{- fail "image.repository is empty and must be a registry and a name, such as registry.example.com/team/gpuslice" }}
{{- end }}
{{- $last := splitList "/" .repository | last }}
{{- if contains "@" .repository }}
{{- fail (printf "image.repository is %q, which has a digest in it; write the part after the @ as image.digest" .repository) }}
{{- else if contains ":" $last }}
{{- fail (printf "image.repository is %q, which has a tag in it; write %q as image.tag" .repository (splitList ":" $last | last)) }}
{{- else if not (regexMatch "^[a-z0-9][a-zA-Z0-9.-]*(:[0-9]+)?(/[a-z0-9._-]+)*$" .repository) }}
{{- fail (printf "image.repository is %q and must be a registry and a name, such as registry.example.com/team/gpuslice, without https://" .repository) }}
{{- end }}
{{- if not (regexMatch "^([A-Za-z0-9_][A-Za-z0-9._-]{0,127})?$" (.tag | default "")) }}
{{- fail (printf "image.tag is %q and must be a tag alone, such as 0.1.0; write a digest as image.digest" .tag) }}
{{- end }}
{{- if not (regexMatch "^(sha256:[0-9a-f]{64})?$" (.digest | default "")) }}
{{- fail (printf "image.digest is %q and must be sha256: and 64 hexadecimal digits" .digest) }}
{{- end }}
{{- end }}

{{/* The first errors of the driver's own reader, with its sentences (core/policy). A step before the driver finds the
others: `gpuslice preflight`. */}}
{{- define "gpuslice.check-policy" }}
{{- if . }}
{{- $body := fromYaml . }}
{{- with include "gpuslice.other-format" (dict "text" . "body" $body) }}
{{- fail (printf "policy: the document is %s, but must be a Policy; docs/policy.md#from-other-tools shows the same settings in a Policy" .) }}
{{- end }}
{{- if and (hasKey $body "Error") (not (regexMatch "(?m)^Error:" .)) }}
{{- fail (printf "policy: the document must be YAML with the keys apiVersion, kind, default, gpus, but: %s" $body.Error) }}
{{- end }}
{{- range $key, $_ := $body }}
{{- if not (has $key (list "apiVersion" "kind" "default" "gpus")) }}
{{- fail (printf "policy: the document has the unknown key '%s'; known keys: apiVersion, kind, default, gpus" $key) }}
{{- end }}
{{- end }}
{{- range $key, $only := dict "apiVersion" "gpuslice.dev/v1alpha1" "kind" "Policy" }}
{{- $found := get $body $key }}
{{- if ne (toString $found) $only }}
{{- $shown := ternary (printf "'%v'" $found) "None" (hasKey $body $key) }}
{{- fail (printf "policy: %s is %s and must be '%s'; write %s: %s" $key $shown $only $key $only) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* As `other_formats.name` of the driver: what the document is, if it is a known file of another tool. */}}
{{- define "gpuslice.other-format" }}
{{- $parted := "a layout file of NVIDIA's mig-parted (the MIG manager of the GPU Operator)" }}
{{- $plugin := "a configuration of NVIDIA's device plugin" }}
{{- $body := .body }}
{{- $items := ternary (fromYamlArray .text) list (hasKey $body "Error") }}
{{- if hasKey $body "mig-configs" }}
{{- $parted }}
{{- else if and $items (kindIs "map" (first $items)) }}
{{- if or (hasKey (first $items) "mig-enabled") (hasKey (first $items) "mig-devices") }}
{{- $parted }}, without version and mig-configs
{{- end }}
{{- else if or (hasKey $body "sharing") (and (eq (toString (get $body "version")) "v1") (hasKey $body "flags")) }}
{{- $plugin }}
{{- else if and (eq (toString (get $body "kind")) "ConfigMap") (kindIs "map" (get $body "data")) }}
{{- $ours := list }}{{ $inside := "" }}
{{- range $key, $text := $body.data }}
{{- if contains "kind: Policy" (toString $text) }}{{ $ours = append $ours $key }}{{ end }}
{{- end }}
{{- if $ours -}}
a ConfigMap with a Policy below data.{{ first $ours }}, of which only that text is the policy
{{- else -}}
a ConfigMap{{ with include "gpuslice.inside" $body.data }} with {{ . }}{{ end }}
{{- end }}
{{- else if eq (toString (get $body "kind")) "ClusterPolicy" -}}
the ClusterPolicy of NVIDIA's GPU Operator
{{- else if eq (toString (get $body "kind")) "SliceConfig" -}}
a SliceConfig, which are the opaque parameters of a claim
{{- else }}
{{- $texts := gt (len $body) 0 }}
{{- range $_, $text := $body }}
{{- if not (and (kindIs "string" $text) (contains "\n" (toString $text))) }}{{ $texts = false }}{{ end }}
{{- end }}
{{- if $texts }}
{{- with include "gpuslice.inside" $body -}}
the data of a ConfigMap with {{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Which tool's file is inside these texts. */}}
{{- define "gpuslice.inside" }}
{{- $all := values . | join "\n" }}
{{- if or (contains "mig-configs:" $all) (contains "mig-devices:" $all) -}}
a layout file of NVIDIA's mig-parted (the MIG manager of the GPU Operator)
{{- else if contains "sharing:" $all -}}
a configuration of NVIDIA's device plugin
{{- end }}
{{- end }}
