from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('jobs', '0002_history_indexes'),
    ]

    operations = [
        migrations.AddField(
            model_name='job',
            name='undo_cancel_at',
            field=models.DateTimeField(null=True),
        ),
    ]
