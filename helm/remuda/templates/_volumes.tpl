{{/* Volumes and where containers see them. Each is named once here. */}}

{{/* Where nothing else may be written: the root file system is read-only. */}}
{{- define "remuda.scratchVolumes" -}}
- name: tmp
  emptyDir: {}
- name: home
  emptyDir: {}
{{- end -}}

{{- define "remuda.scratchMounts" -}}
- name: tmp
  mountPath: /tmp
- name: home
  mountPath: /home/remuda
{{- end -}}

{{- define "remuda.securityFileVolume" -}}
- name: security
  configMap:
    name: {{ include "remuda.fullname" . }}-security
{{- end -}}

{{- define "remuda.securityFileMount" -}}
- name: security
  mountPath: /etc/remuda/security
  readOnly: true
{{- end -}}

{{/* Of pods that answer clients: who may call, API keys, and the certificate. */}}
{{- define "remuda.securityVolumes" -}}
{{ include "remuda.securityFileVolume" . }}
{{- with include "remuda.keysVolume" . }}
{{ . }}
{{- end }}
{{- with .Values.tenants.storeSecret }}
- name: limits-store
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- if .Values.tls.clients.enabled }}
- name: tls
  secret:
    secretName: {{ include "remuda.clientsTlsSecret" . }}
    defaultMode: 0440
{{- end }}
{{- end -}}

{{- define "remuda.securityMounts" -}}
{{ include "remuda.securityFileMount" . }}
{{- with include "remuda.keysMount" . }}
{{ . }}
{{- end }}
{{- if .Values.tenants.storeSecret }}
- name: limits-store
  mountPath: /etc/remuda/limits-store
  readOnly: true
{{- end }}
{{- if .Values.tls.clients.enabled }}
- name: tls
  mountPath: /etc/remuda/tls
  readOnly: true
{{- end }}
{{- end -}}

{{- define "remuda.keysVolume" -}}
{{- if include "remuda.hasKeys" . -}}
- name: keys
  secret:
    secretName: {{ include "remuda.keysSecret" . }}
    defaultMode: 0440
{{- end -}}
{{- end -}}

{{- define "remuda.keysMount" -}}
{{- if include "remuda.hasKeys" . -}}
- name: keys
  mountPath: /etc/remuda/keys
  readOnly: true
{{- end -}}
{{- end -}}

{{/* The certificate that front ends and leaders show each other. */}}
{{- define "remuda.internalTlsVolume" -}}
- name: internal-tls
  secret:
    secretName: {{ include "remuda.internalTlsSecret" . }}
    defaultMode: 0440
{{- end -}}

{{- define "remuda.internalTlsMount" -}}
- name: internal-tls
  mountPath: /etc/remuda/internal-tls
  readOnly: true
{{- end -}}

{{/* What pods of one release show each other. Front ends do not get Ray's token. */}}
{{- define "remuda.clusterVolumes" -}}
- name: cluster-secret
  secret:
    secretName: {{ include "remuda.clusterSecret" .root }}
    defaultMode: 0440
    {{- if or (eq .component "frontend") (ne .root.Values.engine.mode "kuberay") }}
    items:
      - key: cluster-secret
        path: cluster-secret
    {{- end }}
{{- end -}}

{{- define "remuda.clusterMounts" -}}
- name: cluster-secret
  mountPath: /etc/remuda/cluster
  readOnly: true
{{- end -}}

{{/* The checkpoint. Front ends read the tokenizer only, and run on nodes without the engines' disks: they mount the claim. */}}
{{- define "remuda.weightsVolume" -}}
{{- $w := .root.Values.weights -}}
{{- if or (eq $w.source "pvc") (and (eq $w.source "disk") $w.existingClaim (eq .component "frontend")) -}}
- name: weights
  persistentVolumeClaim:
    claimName: {{ $w.existingClaim }}
    readOnly: true
{{- else if eq $w.source "disk" -}}
- name: weights
  hostPath:
    path: {{ $w.hostPath }}
    type: Directory
{{- else if eq $w.source "image" -}}
- name: weights
  image:
    reference: {{ $w.image }}
    pullPolicy: IfNotPresent
{{- end -}}
{{- end -}}

{{- define "remuda.weightsMount" -}}
{{- if ne .Values.weights.source "none" -}}
- name: weights
  mountPath: {{ .Values.weights.mountPath }}
  readOnly: true
{{- end -}}
{{- end -}}
