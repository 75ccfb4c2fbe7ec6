from django.db import migrations

from apps.common.triggers import forbid

SENTENCE = "A profile version never changes; make a new one."


class Migration(migrations.Migration):
    dependencies = [("profiles", "0001_initial")]
    operations = [
        migrations.RunPython(*forbid("profiles_profileversion", "UPDATE", SENTENCE)),
        migrations.RunPython(*forbid("profiles_profileversion", "DELETE", SENTENCE)),
    ]
