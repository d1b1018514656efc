{{/* The command lines of all containers, in one place. */}}

{{/* Of the leader pod: Ray's head, the leader and the first ranks; it waits for the replica's other hosts. */}}
{{- define "remuda.engineCommand" -}}
command: [remuda, engine]
args:
  {{- include "remuda.modelArgs" . | nindent 2 }}
  - --secret-file=/etc/remuda/cluster/cluster-secret
  - --hosts={{ .Values.engine.hosts }}
  - --devices={{ .Values.engine.devicesPerHost }}
  - --node-ip=$(POD_IP)
  - --ray-port=6379
  - --leader-port=9052
  - --host-wait={{ mul .Values.engine.startupMinutes 60 }}
  - --health-port=8080
  {{- include "remuda.topologyArgs" . | nindent 2 }}
  {{- include "remuda.rayTokenArgs" . | nindent 2 }}
  {{- include "remuda.otlpArgs" . | nindent 2 }}
  {{- if .Values.tls.internal.enabled }}
  - --security-file=/etc/remuda/security/engine.yaml
  {{- end }}
  {{- include "remuda.extraModelArgs" . | nindent 2 }}
{{- end -}}

{{/* Of the replica's other pods: joins the leader pod's Ray. */}}
{{- define "remuda.workerCommand" -}}
command: [remuda, worker]
args:
  - --head=$({{ ternary "FQ_RAY_IP" "LWS_LEADER_ADDRESS" (eq .Values.engine.mode "kuberay") }}):6379
  - --secret-file=/etc/remuda/cluster/cluster-secret
  - --device={{ .Values.engine.device }}
  - --devices={{ .Values.engine.devicesPerHost }}
  - --node-ip=$(POD_IP)
  - --health-port=8080
  {{- include "remuda.topologyArgs" . | nindent 2 }}
  {{- include "remuda.rayTokenArgs" . | nindent 2 }}
{{- end -}}

{{/* Of the pods of engine.mode single: front end, leader and ranks. */}}
{{- define "remuda.serveCommand" -}}
command: [remuda, serve]
args:
  {{- include "remuda.modelArgs" . | nindent 2 }}
  - --host=0.0.0.0
  - --port={{ .Values.frontend.httpPort }}
  - --grpc-port={{ .Values.frontend.grpcPort }}
  {{- include "remuda.securityArgs" . | nindent 2 }}
  {{- include "remuda.otlpArgs" . | nindent 2 }}
  {{- if eq .Values.engine.device "cpu" }}
  - --cpu-slots={{ .Values.engine.devicesPerHost }}
  {{- end }}
  {{- include "remuda.extraModelArgs" . | nindent 2 }}
{{- end -}}

{{/* Of front ends. Call with (dict "root" $ "ofLeader" true) for the one beside a leader, which knows no other. */}}
{{- define "remuda.frontendCommand" -}}
{{- $ofLeader := .ofLeader -}}
{{- with .root -}}
command: [remuda, frontend]
args:
  - {{ include "remuda.modelPath" . | quote }}
  - --served-model-name={{ include "remuda.servedName" . }}
  {{- if $ofLeader }}
  - --leaders=$(POD_NAME)=$(POD_IP):9052
  {{- else }}
  - --discover=kubernetes:$(POD_NAMESPACE)/{{ include "remuda.fullname" . }}-leaders
  {{- end }}
  - --secret-file=/etc/remuda/cluster/cluster-secret
  - --host=0.0.0.0
  - --port={{ .Values.frontend.httpPort }}
  - --grpc-port={{ .Values.frontend.grpcPort }}
  {{- include "remuda.securityArgs" . | nindent 2 }}
  {{- include "remuda.otlpArgs" . | nindent 2 }}
  - --drain-timeout={{ .Values.frontend.drainSeconds }}
  {{- if and .Values.rbac.watchNodes (not $ofLeader) }}
  - --watch-nodes
  {{- end }}
  {{- range .Values.model.extraArgs }}
  {{- if regexMatch "^--(guided-decoding-backend|max-lora-rank)=" . }}
  - {{ . | quote }}
  {{- end }}
  {{- end }}
  {{- range .Values.frontend.extraArgs }}
  - {{ . | quote }}
  {{- end }}
{{- end -}}
{{- end -}}

{{/* Of `helm test`. */}}
{{- define "remuda.generateCommand" -}}
command: [remuda, generate, Hello, --max-tokens=4]
args:
  - --target={{ include "remuda.fullname" . }}.{{ .Release.Namespace }}.svc:{{ .Values.frontend.grpcPort }}
  {{- if .Values.tests.tokenSecret }}
  - --api-key-file=/etc/remuda/token/token
  {{- else if include "remuda.makesKey" . }}
  - --api-key-file=/etc/remuda/keys/{{ .Values.auth.key }}
  {{- end }}
  {{- if .Values.tls.clients.enabled }}
  - --ca-file=/etc/remuda/tls/ca.crt
  {{- end }}
{{- end -}}

{{- define "remuda.securityArgs" -}}
- --security-file=/etc/remuda/security/security.yaml
{{- if .Values.auth.insecure }}
- --insecure
{{- end }}
{{- if .Values.tenants.limits }}
- --tenants=/etc/remuda/security/tenants.yaml
{{- end }}
{{- with .Values.tenants.store }}
- --limits-store={{ . }}
{{- end }}
{{- if .Values.tenants.storeSecret }}
- --limits-store-password-file=/etc/remuda/limits-store/password
{{- end }}
{{- end -}}

{{/* Where the pod's node stands. A label that the pod lacks is an empty part. */}}
{{- define "remuda.topologyArgs" -}}
{{- $levels := list -}}
{{- range $index, $_ := .Values.engine.topologyLabels }}{{ $levels = append $levels (printf "$(TOPOLOGY_%d)" (add1 $index)) }}{{ end -}}
{{- with $levels }}
- --topology={{ join "/" . }}
{{- end }}
{{- end -}}

{{/* KubeRay's own init container must reach the group's Ray; else its token is made from the group's secret. */}}
{{- define "remuda.rayTokenArgs" -}}
{{- if eq .Values.engine.mode "kuberay" }}
- --ray-token-file=/etc/remuda/cluster/ray-token
{{- end }}
{{- end -}}

{{/* What `remuda engine` and `remuda serve` have in common: the model and how it is divided. */}}
{{- define "remuda.modelArgs" -}}
- {{ include "remuda.modelPath" . | quote }}
- --served-model-name={{ include "remuda.servedName" . }}
- --device={{ .Values.engine.device }}
- --dtype={{ .Values.model.dtype }}
- --tensor-parallel-size={{ .Values.parallel.tensor }}
- --pipeline-parallel-size={{ .Values.parallel.pipeline }}
- --data-parallel-size={{ .Values.parallel.data }}
- --expert-parallel-size={{ .Values.parallel.expert }}
{{- /* Numbers of files of values are floats, which would be written 1.048576e+06. */}}
- --max-model-len={{ with .Values.model.maxLen }}{{ kindIs "string" . | ternary . (int64 .) }}{{ end }}
{{- if eq .Values.engine.device "cuda" }}
- --gpu-memory-utilization={{ .Values.engine.gpuMemoryUtilization }}
{{- else }}
- --kv-cache-memory={{ .Values.engine.kvCacheMemory }}
{{- end }}
{{- with .Values.model.quantization }}
- --quantization={{ . }}
{{- end }}
{{- with int .Values.model.maxNumSeqs }}
- --max-num-seqs={{ . }}
{{- end }}
- --drain-timeout={{ .Values.engine.drainSeconds }}
{{- end -}}

{{- define "remuda.otlpArgs" -}}
{{- with .Values.monitoring.otlpEndpoint }}
- --otlp-endpoint={{ . }}
{{- end }}
{{- end -}}

{{- define "remuda.extraModelArgs" -}}
{{- range .Values.model.extraArgs }}
- {{ . | quote }}
{{- end }}
{{- end -}}
