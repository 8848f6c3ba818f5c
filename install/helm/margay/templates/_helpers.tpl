{{- define "margay.labels" -}}
app.kubernetes.io/name: margay
app.kubernetes.io/component: agent
{{- end }}

{{- define "margay.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- define "margay.healthPort" -}}
{{ regexFind "[0-9]+$" .Values.healthAddress }}
{{- end }}

{{- define "margay.conflist" -}}
{{- if .Values.cni.conflist -}}
{{ .Values.cni.conflist }}
{{- else -}}
{
  "cniVersion": "1.0.0",
  "cniVersions": ["0.4.0", "1.0.0", "1.1.0"],
  "name": "margay",
  "plugins": [
    {
      "type": "margay",
      "capabilities": {
        "ips": true,
        "mac": true,
        "portMappings": true,
        "io.kubernetes.cri.pod-annotations": true
      },
      "policyPending": {{ .Values.policyPending | quote }},
      "ipam": {
        "type": "margay-ipam"
      }
    }
  ]
}
{{- end }}
{{- end }}
