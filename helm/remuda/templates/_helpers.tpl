{{- define "remuda.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "remuda.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "remuda.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "remuda.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* name and labels of an object. Call with (dict "root" $ "name" "engine" "component" "engine"); both may be absent. */}}
{{- define "remuda.meta" -}}
name: {{ include "remuda.fullname" .root }}{{ with .name }}-{{ . }}{{ end }}
labels:
  {{- include "remuda.labels" .root | nindent 2 }}
  {{- with .component }}
  app.kubernetes.io/component: {{ . }}
  {{- end }}
{{- end -}}

{{- define "remuda.image" -}}
{{- if .Values.image.digest -}}{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}{{- end -}}
{{- end -}}

{{/* Whether front ends are pods of their own: everything but engine.mode single. */}}
{{- define "remuda.hasFrontend" -}}
{{- if ne .Values.engine.mode "single" -}}yes{{- end -}}
{{- end -}}

{{/* The component that clients' traffic goes to. */}}
{{- define "remuda.servingComponent" -}}
{{- if include "remuda.hasFrontend" . -}}frontend{{- else -}}engine{{- end -}}
{{- end -}}

{{/* Whether there are API keys, and whether the chart makes one. */}}
{{- define "remuda.makesKey" -}}
{{- $a := .Values.auth -}}
{{- if not (or $a.insecure $a.existingSecret $a.jwt $a.certificates $a.gateways) -}}yes{{- end -}}
{{- end -}}

{{- define "remuda.hasKeys" -}}
{{- if or .Values.auth.existingSecret (include "remuda.makesKey" .) -}}yes{{- end -}}
{{- end -}}

{{- define "remuda.hasTest" -}}
{{- if and .Values.tests.enabled (not .Values.tls.clients.requireCertificate) (or .Values.auth.insecure .Values.tests.tokenSecret (include "remuda.makesKey" .)) -}}yes{{- end -}}
{{- end -}}

{{/* The container port where serving pods answer probes in plain text. */}}
{{- define "remuda.servingHealthPort" -}}
{{- if .Values.tls.clients.enabled -}}health{{- else -}}http{{- end -}}
{{- end -}}

{{- define "remuda.servedName" -}}
{{- default (base .Values.model.path) .Values.model.servedName -}}
{{- end -}}

{{- define "remuda.modelPath" -}}
{{- if eq .Values.weights.source "none" -}}{{ .Values.model.path }}
{{- else -}}{{ .Values.weights.mountPath }}/{{ .Values.model.path }}{{- end -}}
{{- end -}}

{{- define "remuda.frontendAccount" -}}
{{- default (printf "%s-frontend" (include "remuda.fullname" .)) .Values.serviceAccount.frontendName -}}
{{- end -}}

{{- define "remuda.engineAccount" -}}
{{- default (printf "%s-engine" (include "remuda.fullname" .)) .Values.serviceAccount.engineName -}}
{{- end -}}

{{- define "remuda.clusterSecret" -}}
{{- default (printf "%s-cluster" (include "remuda.fullname" .)) .Values.secrets.existingSecret -}}
{{- end -}}

{{- define "remuda.keysSecret" -}}
{{- default (printf "%s-keys" (include "remuda.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "remuda.clientsTlsSecret" -}}
{{- default (printf "%s-tls" (include "remuda.fullname" .)) .Values.tls.clients.existingSecret -}}
{{- end -}}

{{- define "remuda.internalTlsSecret" -}}
{{- default (printf "%s-internal-tls" (include "remuda.fullname" .)) .Values.tls.internal.existingSecret -}}
{{- end -}}

{{/* What an autoscaler scales: apiVersion, kind and name. */}}
{{- define "remuda.scaleTarget" -}}
{{- if eq .Values.engine.mode "lws" -}}
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
{{- else -}}
apiVersion: apps/v1
kind: Deployment
{{- end }}
name: {{ include "remuda.fullname" . }}-engine
{{- end -}}

{{/* Requests and limits alike. Call with (dict "cpu" … "memory" … "ephemeralStorage" … "more" (dict NAME COUNT)). */}}
{{- define "remuda.resources" -}}
{{- $given := . -}}
{{- range $index, $kind := list "requests" "limits" -}}
{{- if $index }}
{{ end -}}
{{ $kind }}:
  cpu: {{ $given.cpu | quote }}
  memory: {{ $given.memory | quote }}
  ephemeral-storage: {{ $given.ephemeralStorage | quote }}
  {{- range $name, $count := $given.more }}
  {{ $name }}: {{ $count }}
  {{- end }}
{{- end -}}
{{- end -}}

{{- define "remuda.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "remuda.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "remuda.pullSecrets" -}}
{{- with .Values.image.pullSecrets -}}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* nodeSelector, tolerations, affinity and priority. Call with .Values.engine or .Values.frontend. */}}
{{- define "remuda.scheduling" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
