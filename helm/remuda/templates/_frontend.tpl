{{/* A front end. Call with (dict "root" $ "ofLeader" true) for the one beside a leader. */}}
{{- define "remuda.frontendContainer" -}}
{{- $root := .root -}}
{{- $f := $root.Values.frontend -}}
{{- $health := include "remuda.servingHealthPort" $root -}}
- name: frontend
  image: {{ include "remuda.image" $root }}
  imagePullPolicy: {{ $root.Values.image.pullPolicy }}
  {{- include "remuda.frontendCommand" . | nindent 2 }}
  ports:
    - name: http
      containerPort: {{ $f.httpPort }}
    - name: grpc
      containerPort: {{ $f.grpcPort }}
    {{- if $root.Values.tls.clients.enabled }}
    - name: health
      containerPort: {{ $f.healthPort }}
    {{- end }}
  env:
    - name: HOME
      value: /home/remuda
    - name: HF_HUB_OFFLINE
      value: "1"
    {{- if .ofLeader }}
    - name: POD_IP
      valueFrom:
        fieldRef:
          fieldPath: status.podIP
    - name: POD_NAME
      valueFrom:
        fieldRef:
          fieldPath: metadata.name
    {{- else }}
    - name: POD_NAMESPACE
      valueFrom:
        fieldRef:
          fieldPath: metadata.namespace
    {{- end }}
    {{- with $f.extraEnv }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  startupProbe:
    httpGet:
      path: /livez
      port: {{ $health }}
    periodSeconds: 2
    failureThreshold: 60
  livenessProbe:
    httpGet:
      path: /livez
      port: {{ $health }}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 3
  readinessProbe:
    httpGet:
      path: /readyz
      port: {{ $health }}
    periodSeconds: 5
    timeoutSeconds: 3
    failureThreshold: 1
  lifecycle:
    preStop:
      sleep:
        seconds: {{ $f.unreadySeconds }}
  securityContext:
    {{- include "remuda.containerSecurity" $root | nindent 4 }}
  resources:
    {{- include "remuda.resources" $f.resources | nindent 4 }}
  volumeMounts:
    {{- include "remuda.scratchMounts" $root | nindent 4 }}
    {{- include "remuda.clusterMounts" $root | nindent 4 }}
    {{- include "remuda.securityMounts" $root | nindent 4 }}
    {{- if $root.Values.tls.internal.enabled }}
    {{- include "remuda.internalTlsMount" $root | nindent 4 }}
    {{- end }}
    {{- with include "remuda.weightsMount" $root }}
    {{- . | nindent 4 }}
    {{- end }}
    {{- with $f.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* Of the pods that clients reach. */}}
{{- define "remuda.readinessGates" -}}
{{- with .Values.frontend.readinessGates -}}
readinessGates:
  {{- range . }}
  - conditionType: {{ . }}
  {{- end }}
{{- end -}}
{{- end -}}
