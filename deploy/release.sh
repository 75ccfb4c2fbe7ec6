#!/bin/sh
# Puts this image's code into the volume /release and moves the link "current": one step, so that nobody
# ever starts from half a copy. A release that is there already is left alone, so the workers go on.
# The release in use before stays, those before that go.
set -eu
source=${RIGPANEL_SOURCE:-/opt/rigpanel}
release=${RIGPANEL_RELEASE:-/release}
cd "$source"
version=$(find . -path ./.venv -prune -o -type f -print0 | sort -z | xargs -0 sha256sum | sha256sum | cut -c1-16)
target="$release/$version"
before=$(readlink -f "$release/current" 2> /dev/null || true)
if [ ! -d "$target" ]; then
    rm -rf "$target.part"
    cp -a "$source" "$target.part"
    mv "$target.part" "$target"
fi
ln -sfn "$version" "$release/next"
mv -T "$release/next" "$release/current"
for old in "$release"/*/; do
    old=${old%/}
    case $old in "$target" | "$before" | "$release/current") ;; *) rm -rf "$old" ;; esac
done
