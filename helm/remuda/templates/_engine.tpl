{{/* The pod of a replica. Call with (dict "root" $ "role" "leader"|"worker"). */}}
{{- define "remuda.enginePodTemplate" -}}
metadata:
  labels:
    {{- include "remuda.selector" .root | nindent 4 }}
    app.kubernetes.io/component: engine
    remuda.io/role: {{ .role }}
    {{- with .root.Values.engine.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- $annotations := dict }}
  {{- if include "remuda.leaderServes" . }}{{ $_ := set $annotations "checksum/config" (include "remuda.securityFile" .root | sha256sum) }}{{ end }}
  {{- with merge $annotations .root.Values.engine.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- include "remuda.enginePodSpec" . | nindent 2 }}
{{- end -}}

{{- define "remuda.enginePodSpec" -}}
{{- $root := .root -}}
{{- $e := $root.Values.engine -}}
serviceAccountName: {{ include "remuda.engineAccount" $root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with include "remuda.pullSecrets" $root }}
{{ . }}
{{- end }}
securityContext:
  {{- include "remuda.podSecurity" $root | nindent 2 }}
terminationGracePeriodSeconds: {{ include "remuda.engineGrace" . }}
{{- if eq $e.mode "single" }}
{{- with include "remuda.readinessGates" $root }}
{{ . }}
{{- end }}
{{- end }}
{{- include "remuda.scheduling" $e }}
{{- if and $e.spreadTopologyKey (eq .role "leader") }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: {{ $e.spreadTopologyKey }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "remuda.selector" $root | nindent 8 }}
        remuda.io/role: leader
{{- end }}
{{- if include "remuda.fills" $root }}
initContainers:
  {{- include "remuda.fillContainer" $root | nindent 2 }}
{{- end }}
containers:
  {{- include "remuda.engineContainer" . | nindent 2 }}
  {{- if and (include "remuda.leaderServes" .) (ne $e.mode "single") }}
  {{- include "remuda.frontendContainer" (dict "root" $root "ofLeader" true) | nindent 2 }}
  {{- end }}
volumes:
  - name: shm
    emptyDir:
      medium: Memory
      sizeLimit: {{ $e.sharedMemory }}
  {{- include "remuda.scratchVolumes" $root | nindent 2 }}
  {{- if ne $e.mode "single" }}
  {{- include "remuda.clusterVolumes" (dict "root" $root "component" "engine") | nindent 2 }}
  {{- end }}
  {{- if include "remuda.leaderServes" . }}
  {{- include "remuda.securityVolumes" $root | nindent 2 }}
  {{- else if include "remuda.leaderHasTls" . }}
  {{- include "remuda.securityFileVolume" $root | nindent 2 }}
  {{- end }}
  {{- if include "remuda.leaderHasTls" . }}
  {{- include "remuda.internalTlsVolume" $root | nindent 2 }}
  {{- end }}
  {{- with include "remuda.weightsVolume" (dict "root" $root "component" "engine") }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if include "remuda.fills" $root }}
  {{- include "remuda.fillVolume" $root | nindent 2 }}
  {{- end }}
  {{- with $e.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- if and (include "remuda.leaderServes" .) (ne $e.mode "single") }}
  {{- with $root.Values.frontend.extraVolumes }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  {{- end }}
{{- end -}}

{{/* For the slowest container of the pod. */}}
{{- define "remuda.engineGrace" -}}
{{- $e := .root.Values.engine -}}
{{- $f := .root.Values.frontend -}}
{{- $engine := add $e.unreadySeconds $e.drainSeconds 30 -}}
{{- if and (include "remuda.leaderServes" .) (ne $e.mode "single") -}}
{{- max $engine (add $f.unreadySeconds $f.drainSeconds 15) -}}
{{- else -}}
{{- $engine -}}
{{- end -}}
{{- end -}}

{{/* Whether this pod shows front ends a certificate. */}}
{{- define "remuda.leaderHasTls" -}}
{{- if and (eq .role "leader") .root.Values.tls.internal.enabled -}}yes{{- end -}}
{{- end -}}

{{/* Whether this pod answers clients. */}}
{{- define "remuda.leaderServes" -}}
{{- if and (eq .role "leader") (or .root.Values.inferencePool.enabled (eq .root.Values.engine.mode "single")) -}}yes{{- end -}}
{{- end -}}

{{- define "remuda.engineContainer" -}}
{{- $root := .root -}}
{{- $e := $root.Values.engine -}}
- name: engine
  image: {{ include "remuda.image" $root }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  {{- if eq $e.mode "single" }}
  {{- include "remuda.serveCommand" $root | nindent 2 }}
  {{- else if eq .role "leader" }}
  {{- include "remuda.engineCommand" $root | nindent 2 }}
  {{- else }}
  {{- include "remuda.workerCommand" $root | nindent 2 }}
  {{- end }}
  ports:
    {{- include "remuda.enginePorts" . | nindent 4 }}
  env:
    {{- include "remuda.engineEnv" $root | nindent 4 }}
  {{- include "remuda.engineProbes" $root | nindent 2 }}
  lifecycle:
    preStop:
      sleep:
        {{- if eq .role "leader" }}
        seconds: {{ $e.unreadySeconds }}
        {{- else }}
        # Its ranks are needed until the leader has drained.
        seconds: {{ add $e.unreadySeconds $e.drainSeconds }}
        {{- end }}
  securityContext:
    {{- include "remuda.containerSecurity" $root | nindent 4 }}
      {{- if $e.rdma.enabled }}
      add: [IPC_LOCK]
      {{- end }}
  resources:
    {{- $more := dict -}}
    {{- if eq $e.device "cuda" }}{{ $_ := set $more $e.gpuResource $e.devicesPerHost }}{{ end -}}
    {{- if $e.rdma.enabled }}{{ $_ := set $more $e.rdma.resource $e.rdma.count }}{{ end -}}
    {{- include "remuda.resources" (merge (dict "more" $more) $e.resources) | nindent 4 }}
  volumeMounts:
    - name: shm
      mountPath: /dev/shm
    {{- include "remuda.scratchMounts" $root | nindent 4 }}
    {{- if ne $e.mode "single" }}
    {{- include "remuda.clusterMounts" $root | nindent 4 }}
    {{- end }}
    {{- if eq $e.mode "single" }}
    {{- include "remuda.securityMounts" $root | nindent 4 }}
    {{- else if include "remuda.leaderHasTls" . }}
    {{- include "remuda.securityFileMount" $root | nindent 4 }}
    {{- include "remuda.internalTlsMount" $root | nindent 4 }}
    {{- end }}
    {{- with include "remuda.weightsMount" $root }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $e.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{- define "remuda.enginePorts" -}}
{{- if eq .root.Values.engine.mode "single" -}}
- name: http
  containerPort: {{ .root.Values.frontend.httpPort }}
- name: grpc
  containerPort: {{ .root.Values.frontend.grpcPort }}
{{- if .root.Values.tls.clients.enabled }}
- name: health
  containerPort: {{ .root.Values.frontend.healthPort }}
{{- end }}
{{- else -}}
- name: health
  containerPort: 8080
{{- if eq .role "leader" }}
- name: leader
  containerPort: 9052
- name: ray
  containerPort: 6379
{{- end }}
{{- end -}}
{{- end -}}

{{- define "remuda.engineEnv" -}}
- name: HOME
  value: /home/remuda
- name: TMPDIR
  value: /tmp
- name: HF_HUB_OFFLINE
  value: "1"
{{- if ne .Values.engine.mode "single" }}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
{{- range $index, $label := .Values.engine.topologyLabels }}
- name: TOPOLOGY_{{ add1 $index }}
  valueFrom:
    fieldRef:
      fieldPath: metadata.labels['{{ $label }}']
{{- end }}
{{- if eq .Values.engine.mode "kuberay" }}
# KubeRay gives its init container the same variables and volumes.
- name: RAY_AUTH_MODE
  value: token
- name: RAY_AUTH_TOKEN_PATH
  value: /etc/remuda/cluster/ray-token
{{- end }}
{{- end }}
{{- with .Values.engine.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "remuda.engineProbes" -}}
{{- $port := ternary (include "remuda.servingHealthPort" .) "health" (eq .Values.engine.mode "single") -}}
startupProbe:
  httpGet:
    path: /readyz
    port: {{ $port }}
  periodSeconds: 10
  failureThreshold: {{ mul .Values.engine.startupMinutes 6 }}
livenessProbe:
  httpGet:
    path: /livez
    port: {{ $port }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  httpGet:
    path: /readyz
    port: {{ $port }}
  periodSeconds: 5
  timeoutSeconds: 3
  failureThreshold: 1
{{- end -}}
