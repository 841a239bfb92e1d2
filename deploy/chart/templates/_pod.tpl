{{/* What the pods of driver and supervisor have in common. */}}

{{/* Not empty, unless the value switches a part off. Missing, as in the values of an older chart, and null mean on. */}}
{{- define "gpuslice.is-on" -}}
{{- if ne (toString .) "false" }}true{{ end }}
{{- end }}

{{- define "gpuslice.image" -}}
{{- $tag := .Values.image.tag | default (ternary "" .Chart.AppVersion (not (empty .Values.image.digest))) -}}
image: {{ .Values.image.repository }}{{ with $tag }}:{{ . }}{{ end }}{{ with .Values.image.digest }}@{{ . }}{{ end }}
{{- if eq .Values.image.repository "gpuslice" }} # put your registry before the name{{ end }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- define "gpuslice.where" -}}
{{ include "gpuslice.nodes" . }}
{{- with .Values.tolerations }}
tolerations:
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "gpuslice.nodes" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{ toYaml . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
{{ toYaml . | indent 2 }}
{{- end }}
{{- if not .Values.simulate }}
{{- with .Values.affinity }}
affinity: # the default: any label of Node Feature Discovery or GPU Feature Discovery
{{ toYaml . | indent 2 }}
{{- end }}
{{- end }}
{{- end }}

{{- define "gpuslice.environment" -}}
{{- if ne .Values.kubeletRootDir "/var/lib/kubelet" }}
- {name: KUBELET_PLUGINS_DIRECTORY_PATH, value: {{ .Values.kubeletRootDir }}/plugins}
{{- end }}
{{- if ne .Values.logLevel "info" }}
- {name: LOG_LEVEL, value: {{ .Values.logLevel }}}
{{- end }}
{{- with .Values.simulate }}
- {name: SIMULATE, value: {{ quote . }}}
{{- end }}
{{- end }}

{{/* What the user adds to the variables of a container: `list` names the value, `entries` is the value, and `taken` has the
remedy for each variable that the chart sets itself. With one name twice, Helm 4 could not apply the object. */}}
{{- define "gpuslice.more-environment" -}}
{{- $taken := merge (dict
  "DRIVER_NAME" "leave it out, because classes, claims and paths contain gpuslice.dev"
  "DRIVER_ROOT_CTR_PATH" "set the value nvidiaDriverRoot instead"
  "KUBELET_PLUGINS_DIRECTORY_PATH" "set the value kubeletRootDir instead"
  "LOG_LEVEL" "set the value logLevel instead"
  "MPS_ROOT" "leave it out, because the chart mounts /run/gpuslice/mps"
  "NVIDIA_VISIBLE_DEVICES" "leave it out, because the claims of pods decide which devices they get"
  "SIMULATE" "set the value simulate instead") .taken }}
{{- $list := .list }}
{{- range $entry := .entries }}
{{- with get $taken $entry.name }}
{{- fail (printf "%s has %s, which is set already; %s" $list $entry.name .) }}
{{- end }}
{{- $_ := set $taken $entry.name "keep one of the two" }}
- {{ toJson $entry }}
{{- end }}
{{- end }}

{{/* The variables of the driver, and of the step before it. */}}
{{- define "gpuslice.driver-variables" -}}
- name: NODE_NAME
  valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
- name: POD_UID
  valueFrom: {fieldRef: {fieldPath: metadata.uid}}
- name: POD_NAMESPACE
  valueFrom: {fieldRef: {fieldPath: metadata.namespace}}
- {name: NVIDIA_DRIVER_ROOT, value: {{ .Values.nvidiaDriverRoot }}} # /run/nvidia/driver with the GPU operator's driver container
- {name: DRIVER_ROOT_CTR_PATH, value: /driver-root}
- {name: POLICY, value: /etc/gpuslice/policy.yaml}
- {name: HTTP_ENDPOINT, value: ":{{ .Values.http.port }}"}
- {name: NVIDIA_VISIBLE_DEVICES, value: void} # NVIDIA's container runtime must add nothing to this container
{{- if ne .Values.kubeletRootDir "/var/lib/kubelet" }}
- {name: KUBELET_REGISTRAR_DIRECTORY_PATH, value: {{ .Values.kubeletRootDir }}/plugins_registry}
{{- end }}
{{- if ne .Values.cdiRoot "/var/run/cdi" }}
- {name: CDI_ROOT, value: {{ .Values.cdiRoot }}}
{{- end }}
{{- with (.Values.apiServer).host }}
- {name: KUBERNETES_SERVICE_HOST, value: {{ quote . }}}
{{- end }}
{{- with (.Values.apiServer).port }}
- {name: KUBERNETES_SERVICE_PORT, value: {{ quote . }}}
{{- end }}
{{- with include "gpuslice.environment" . | trim }}{{ nindent 0 . }}{{ end }}
{{- with include "gpuslice.driver-environment" . | trim }}{{ nindent 0 . }}{{ end }}
{{- end }}

{{- define "gpuslice.driver-environment" -}}
{{- $taken := dict
  "CDI_ROOT" "set the value cdiRoot instead"
  "HTTP_ENDPOINT" "set the value http.port instead"
  "KUBELET_REGISTRAR_DIRECTORY_PATH" "set the value kubeletRootDir instead"
  "KUBERNETES_SERVICE_HOST" "set the value apiServer.host instead"
  "KUBERNETES_SERVICE_PORT" "set the value apiServer.port instead"
  "NODE_NAME" "leave it out, because each pod has the name of its node"
  "NVIDIA_DRIVER_ROOT" "set the value nvidiaDriverRoot instead"
  "POD_NAMESPACE" "leave it out, because each pod has its own namespace"
  "POD_UID" "leave it out, because each pod has its own UID"
  "POLICY" "set the value policy instead" }}
{{- include "gpuslice.more-environment" (dict "list" "extraEnv" "entries" .Values.extraEnv "taken" $taken) }}
{{- end }}
