{{/* Copies the checkpoint from the claim to the node's disk: a container of the Job, and an init container of engine pods. */}}

{{- define "remuda.fills" -}}
{{- if and (eq .Values.weights.source "disk") .Values.weights.existingClaim -}}yes{{- end -}}
{{- end -}}

{{/* A file gets its name only when it is whole, so that a copy that was cut off is taken up again. Its time of change comes
along: what was put in its place since is of another size or time, whenever that was made. */}}
{{- define "remuda.fillScript" -}}
set -eu
cd "$FROM"
mkdir -p "$TO"
exec 9>"$TO/.filling"
flock 9
# Not in a pipe, where it could fail unseen.
files=$(find -L . -type f)
if [ -z "$files" ]; then echo "$FROM holds no files" >&2; exit 1; fi
printf '%s\n' "$files" | while IFS= read -r file; do
  if [ -e "$TO/$file" ] && [ "$(stat -L -c '%s %Y' "$file")" = "$(stat -c '%s %Y' "$TO/$file")" ]; then continue; fi
  echo "$file"
  mkdir -p "$(dirname "$TO/$file")"
  cp --preserve=timestamps "$file" "$TO/$file.part"
  mv "$TO/$file.part" "$TO/$file"
done
{{- end -}}

{{- define "remuda.fillContainer" -}}
- name: fill
  image: {{ include "remuda.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  command: [sh, -c]
  args:
    - |
      {{- include "remuda.fillScript" . | nindent 6 }}
  env:
    - name: FROM
      value: {{ printf "/from/%s" .Values.model.path | quote }}
    - name: TO
      value: {{ printf "/disk/%s" .Values.model.path | quote }}
  securityContext:
    {{- include "remuda.containerSecurity" . | nindent 4 }}
  resources:
    {{- include "remuda.resources" (dict "cpu" "1" "memory" "4Gi" "ephemeralStorage" "64Mi") | nindent 4 }}
  volumeMounts:
    - name: from
      mountPath: /from
      readOnly: true
    - name: weights
      mountPath: /disk
{{- end -}}

{{- define "remuda.fillVolume" -}}
- name: from
  persistentVolumeClaim:
    claimName: {{ .Values.weights.existingClaim }}
    readOnly: true
{{- end -}}
