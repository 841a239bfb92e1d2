{{/* What the pods of driver and supervisor have in common. */}}

{{- define "gpuslice.image" -}}
image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- if eq .Values.image.repository "gpuslice" }} # put your registry before the name{{ end }}
{{- with .Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- define "gpuslice.where" -}}
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
{{- with .Values.tolerations }}
tolerations:
{{ toYaml . }}
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

{{- define "gpuslice.driver-environment" -}}
{{- $taken := dict
  "CDI_ROOT" "set the value cdiRoot instead"
  "HTTP_ENDPOINT" "set the value http.port instead"
  "KUBELET_REGISTRAR_DIRECTORY_PATH" "set the value kubeletRootDir instead"
  "KUBERNETES_SERVICE_HOST" "set the value apiServer.host instead"
  "KUBERNETES_SERVICE_PORT" "set the value apiServer.port instead"
  "NODE_NAME" "leave it out, because each pod has the name of its node"
  "NVIDIA_DRIVER_ROOT" "set the value nvidiaDriverRoot instead"
  "POD_UID" "leave it out, because each pod has its own UID"
  "POLICY" "set the value policy instead" }}
{{- include "gpuslice.more-environment" (dict "list" "extraEnv" "entries" .Values.extraEnv "taken" $taken) }}
{{- end }}
