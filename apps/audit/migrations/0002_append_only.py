from django.db import migrations

from apps.common.triggers import forbid

SENTENCE = "The audit is append-only."


class Migration(migrations.Migration):
    dependencies = [("audit", "0001_initial")]
    operations = [
        migrations.RunPython(*forbid("audit_auditentry", "UPDATE", SENTENCE)),
        migrations.RunPython(*forbid("audit_auditentry", "DELETE", SENTENCE)),
    ]
