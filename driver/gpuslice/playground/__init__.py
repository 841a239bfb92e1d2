"""`gpuslice playground`: a stand-in cluster in the background of one terminal, with claims from the DeviceClasses."""
