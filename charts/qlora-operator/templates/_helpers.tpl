{{- define "qlora.name" -}}
{{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "qlora.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains $name .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- /* Names of what is cluster-wide: two releases may not meet. */ -}}
{{- define "qlora.clusterName" -}}
{{- printf "%s-%s" .Release.Namespace (include "qlora.fullname" .) | trunc 120 }}
{{- end }}

{{- define "qlora.selectorLabels" -}}
app.kubernetes.io/name: {{ include "qlora.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "qlora.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "qlora.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: qlora-operator
{{- end }}

{{- define "qlora.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "qlora.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- /* (dict "image" .Values.image "root" $): repository with digest or tag. */ -}}
{{- define "qlora.image" -}}
{{- if .image.digest }}
{{- printf "%s@%s" .image.repository .image.digest }}
{{- else }}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) }}
{{- end }}
{{- end }}

{{- /* The ConfigMap in which the operator keeps what it learned of predicted and measured memory. */ -}}
{{- define "qlora.memoryConfigMap" -}}
{{ include "qlora.fullname" . }}-memory
{{- end }}

{{- /* Namespace and name of the Lease whose holder operates, where there are several replicas. Empty: there is one. */ -}}
{{- define "qlora.lease" -}}
{{- if gt (int (.Values.replicas | default 1)) 1 }}
{{- printf "%s/%s" .Release.Namespace (include "qlora.fullname" .) }}
{{- end }}
{{- end }}

{{- /* Labels that the operator puts on every pod of a job (operator/qlora_operator/names.py). */ -}}
{{- define "qlora.trainerSelector" -}}
matchLabels:
  app.kubernetes.io/managed-by: qlora-operator
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: [trainer, prepare]}
{{- end }}

{{- define "qlora.pullSecrets" -}}
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
