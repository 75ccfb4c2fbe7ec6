import django.db.models.deletion
from django.db import migrations, models


def old_failures_stay_down(apps, schema_editor):
    """Until now ``desired`` of what had died was never looked at again: nobody wants those back."""
    apps.get_model("deployments", "Deployment").objects.filter(status="failed").update(desired="stopped")


class Migration(migrations.Migration):

    dependencies = [
        ('deployments', '0003_replica_condition'),
        ('profiles', '0002_immutable_versions'),
    ]

    operations = [
        migrations.AddField(
            model_name='replica',
            name='members',
            field=models.JSONField(default=list),
        ),
        migrations.CreateModel(
            name='RestartPolicy',
            fields=[
                ('id', models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name='ID')),
                ('restarts', models.PositiveIntegerField(default=3)),
                ('window_seconds', models.FloatField(default=600.0)),
                ('backoff_seconds', models.FloatField(default=10.0)),
                ('probe_every_seconds', models.FloatField(default=60.0)),
                ('probe_limit_seconds', models.FloatField(default=60.0)),
                ('probe_failures', models.PositiveIntegerField(default=3)),
                ('profile', models.OneToOneField(on_delete=django.db.models.deletion.CASCADE, related_name='restart_policy', to='profiles.profile')),
            ],
        ),
        migrations.RunPython(old_failures_stay_down, migrations.RunPython.noop),
    ]
