from django.db import migrations, models


class Migration(migrations.Migration):

    dependencies = [
        ('deployments', '0009_clock'),
    ]

    operations = [
        migrations.AddField(
            model_name='deployment',
            name='cut_by_name',
            field=models.CharField(blank=True, max_length=200),
        ),
    ]
