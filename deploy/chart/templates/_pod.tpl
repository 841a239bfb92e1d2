{{/* What the pods of driver and supervisor have in common. */}}

{{- define "gpuslice.image" -}}
image: {{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
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
