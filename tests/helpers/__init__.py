"""What tests share: models, odd shapes, fake devices and servers."""
